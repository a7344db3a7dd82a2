//! Rules of aarch64.

use std::fmt;

use gimli::{AArch64, CfaRule, CommonInformationEntry, RegisterRule, UnwindTableRow};
use profiler_common::unwind::aarch64::BaseReg;
use profiler_common::unwind::{FpRule, RuleKind, UnwindRule};

use super::{Inexpressible, display_bare, offset};
use crate::eh_frame::Bytes;

pub(super) fn from_row(
    row: &UnwindTableRow<usize>,
    cie: &CommonInformationEntry<Bytes<'_>>,
) -> Result<UnwindRule, Inexpressible> {
    let return_address = row.register(AArch64::X30);
    let CfaRule::RegisterAndOffset { register, offset: cfa_offset } = row.cfa() else {
        return Err(Inexpressible::CfaExpression);
    };
    let base = u8::try_from(register.0).ok().and_then(BaseReg::decode).ok_or(Inexpressible::CfaRegister)?;
    if cie.is_signal_trampoline() {
        return signal_frame(base, *cfa_offset, return_address);
    }
    let cfa_offset = offset(*cfa_offset)?;
    let (fp, fp_offset) = frame_pointer(row.register(AArch64::X29))?;
    let rule = |kind: RuleKind, scale: u8, fp_offset: i32| UnwindRule {
        kind: kind as u8,
        base: base as u8,
        fp: fp as u8,
        scale,
        cfa_offset,
        fp_offset,
    };
    match return_address {
        None | Some(RegisterRule::SameValue) => Ok(rule(RuleKind::LinkRegister, 0, fp_offset)),
        Some(RegisterRule::Undefined) => Ok(UnwindRule::END),
        Some(RegisterRule::Offset(value)) if fp == FpRule::AtCfa => {
            Ok(rule(RuleKind::Cfa, distance(value, fp_offset)?, fp_offset))
        }
        Some(RegisterRule::Offset(value)) => Ok(rule(RuleKind::Cfa, 0, offset(value)?)),
        Some(_) => Err(Inexpressible::ReturnAddress),
    }
}

/// From the saved frame pointer to the return address, in words, as the rule holds it.
fn distance(return_address: i64, fp_offset: i32) -> Result<u8, Inexpressible> {
    let bytes = return_address.checked_sub(fp_offset.into()).ok_or(Inexpressible::Offset)?;
    if bytes % 8 != 0 {
        return Err(Inexpressible::ReturnAddress);
    }
    i8::try_from(bytes / 8).map(|words| words as u8).map_err(|_| Inexpressible::Offset)
}

fn frame_pointer(rule: Option<RegisterRule<usize>>) -> Result<(FpRule, i32), Inexpressible> {
    match rule {
        None | Some(RegisterRule::SameValue) => Ok((FpRule::Same, 0)),
        Some(RegisterRule::Undefined) => Ok((FpRule::Undefined, 0)),
        Some(RegisterRule::Offset(value)) => Ok((FpRule::AtCfa, offset(value)?)),
        Some(_) => Err(Inexpressible::FramePointer),
    }
}

/// The kernel's frame, recognized by the frame record that it puts at x29.
///
/// Source: arch/arm64/kernel/vdso/sigreturn.S.
fn signal_frame(
    base: BaseReg,
    cfa_offset: i64,
    return_address: Option<RegisterRule<usize>>,
) -> Result<UnwindRule, Inexpressible> {
    match (base, cfa_offset, return_address) {
        (BaseReg::X29, 0, Some(RegisterRule::Offset(8))) => Ok(UnwindRule::SIGNAL),
        _ => Err(Inexpressible::SignalFrame),
    }
}

pub(super) fn display(rule: &UnwindRule, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if let Some(text) = display_bare(rule) {
        return f.write_str(text);
    }
    let base = match BaseReg::decode(rule.base) {
        Some(BaseReg::X29) => "x29",
        Some(BaseReg::Sp) => "sp",
        None => "?",
    };
    write!(f, "cfa={base}{:+}", rule.cfa_offset)?;
    match FpRule::decode(rule.fp) {
        Some(FpRule::Same) => {}
        Some(FpRule::AtCfa) => write!(f, " x29=[cfa{:+}]", rule.fp_offset)?,
        Some(FpRule::AtFp) => write!(f, " x29=[x29{:+}]", rule.fp_offset)?,
        Some(FpRule::Undefined) => f.write_str(" x29=undefined")?,
        None => write!(f, " fp {}?", rule.fp)?,
    }
    match RuleKind::decode(rule.kind) {
        Some(RuleKind::Cfa | RuleKind::CfaElsewhere) => {
            let slot = i64::from(rule.fp_offset) + i64::from(rule.scale as i8) * 8;
            write!(f, " ra=[cfa{slot:+}]")
        }
        Some(RuleKind::LinkRegister) => f.write_str(" ra=x30"),
        _ => write!(f, " kind {}?", rule.kind),
    }
}
