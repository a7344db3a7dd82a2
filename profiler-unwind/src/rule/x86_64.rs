//! Rules of x86-64.

use std::fmt;

use gimli::{
    CfaRule, CommonInformationEntry, Operation, RegisterRule, UnwindExpression, UnwindSection,
    UnwindTableRow, X86_64,
};
use profiler_common::unwind::x86_64::{BaseReg, RBX_LOST, RBX_SAME, RBX_WORDS_MAX};
use profiler_common::unwind::{FpRule, RuleKind, UnwindRule};

use super::{Inexpressible, display_bare, offset, operations};
use crate::eh_frame::Bytes;

/// Where the ABI has the return address, from the CFA.
const RETURN_ADDRESS_OFFSET: i64 = -8;

/// Where the trampoline of a signal handler finds the interrupted rip: see the signal frame of the step.
const SIGNAL_RIP_OFFSET: i64 = 168;

pub(super) fn from_row<'a, S: UnwindSection<Bytes<'a>>>(
    row: &UnwindTableRow<usize>,
    section: &S,
    cie: &CommonInformationEntry<Bytes<'a>>,
) -> Result<UnwindRule, Inexpressible> {
    let return_address = row.register(X86_64::RA);
    if cie.is_signal_trampoline() {
        return signal_frame(return_address, section, cie);
    }
    match return_address {
        Some(RegisterRule::Offset(RETURN_ADDRESS_OFFSET)) => {}
        Some(RegisterRule::Undefined) => return Ok(UnwindRule::END),
        _ => return Err(Inexpressible::ReturnAddress),
    }
    let rbx = rbx(row.register(X86_64::RBX));
    let rule = match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => cfa(RuleKind::Cfa, register.0, *offset, rbx)?,
        CfaRule::Expression(expression) => cfa_expression(expression, rbx, section, cie)?,
    };
    let (fp, fp_offset) = frame_pointer(row.register(X86_64::RBP), section, cie)?;
    Ok(UnwindRule { fp: fp as u8, fp_offset, ..rule })
}

fn cfa(kind: RuleKind, register: u16, value: i64, scale: u8) -> Result<UnwindRule, Inexpressible> {
    let base = u8::try_from(register).ok().and_then(BaseReg::decode).ok_or(Inexpressible::CfaRegister)?;
    let cfa_offset = offset(value)?;
    Ok(UnwindRule { kind: kind as u8, base: base as u8, fp: 0, scale, cfa_offset, fp_offset: 0 })
}

/// Where the caller's rbx is, as the step takes it.
fn rbx(rule: Option<RegisterRule<usize>>) -> u8 {
    match rule {
        None | Some(RegisterRule::SameValue) => RBX_SAME,
        Some(RegisterRule::Offset(offset)) if offset % 8 == 0 => {
            let words = u8::try_from(offset / -8).ok().filter(|words| (2..=RBX_WORDS_MAX).contains(words));
            words.unwrap_or(RBX_LOST)
        }
        Some(_) => RBX_LOST,
    }
}

/// The forms that compilers, assemblers and linkers write.
fn cfa_expression<'a, S: UnwindSection<Bytes<'a>>>(
    expression: &UnwindExpression<usize>,
    rbx: u8,
    section: &S,
    cie: &CommonInformationEntry<Bytes<'a>>,
) -> Result<UnwindRule, Inexpressible> {
    let operations = operations(expression, section, cie).ok_or(Inexpressible::CfaExpression)?;
    match operations[..] {
        [Operation::RegisterOffset { register, offset, .. }] => cfa(RuleKind::Cfa, register.0, offset, rbx),
        // A function that realigned its stack keeps the CFA in a slot: gcc's DRAP.
        [
            Operation::RegisterOffset { register, offset, .. },
            Operation::Deref { size: 8, space: false, .. },
        ] => cfa(RuleKind::CfaAt, register.0, offset, 0),
        // OpenSSL's assembly keeps the old rsp in a slot, less what was pushed.
        [
            Operation::RegisterOffset { register, offset, .. },
            Operation::Deref { size: 8, space: false, .. },
            Operation::PlusConstant { value },
        ] => cfa(RuleKind::CfaAt, register.0, offset, words(value)?),
        // binutils' lazy PLT: rsp + 8 + ((rip & 15) >= K) * 8.
        [
            Operation::RegisterOffset { register: X86_64::RSP, offset: 8, .. },
            Operation::RegisterOffset { register: X86_64::RA, offset: 0, .. },
            Operation::UnsignedConstant { value: 15 },
            Operation::And,
            Operation::UnsignedConstant { value: pushed @ 0..=15 },
            Operation::Ge,
            Operation::UnsignedConstant { value: 3 },
            Operation::Shl,
            Operation::Plus,
        ] => cfa(RuleKind::Plt, X86_64::RSP.0, 8, pushed as u8),
        _ => Err(Inexpressible::CfaExpression),
    }
}

fn words(bytes: u64) -> Result<u8, Inexpressible> {
    if !bytes.is_multiple_of(8) {
        return Err(Inexpressible::CfaExpression);
    }
    u8::try_from(bytes / 8).map_err(|_| Inexpressible::Offset)
}

fn frame_pointer<'a, S: UnwindSection<Bytes<'a>>>(
    rule: Option<RegisterRule<usize>>,
    section: &S,
    cie: &CommonInformationEntry<Bytes<'a>>,
) -> Result<(FpRule, i32), Inexpressible> {
    match rule {
        None | Some(RegisterRule::SameValue) => Ok((FpRule::Same, 0)),
        Some(RegisterRule::Undefined) => Ok((FpRule::Undefined, 0)),
        Some(RegisterRule::Offset(value)) => Ok((FpRule::AtCfa, offset(value)?)),
        Some(RegisterRule::Expression(expression)) => {
            match operations(&expression, section, cie).as_deref() {
                Some([Operation::RegisterOffset { register: X86_64::RBP, offset: value, .. }]) => {
                    Ok((FpRule::AtFp, offset(*value)?))
                }
                _ => Err(Inexpressible::FramePointer),
            }
        }
        Some(_) => Err(Inexpressible::FramePointer),
    }
}

/// The kernel's frame, recognized by where it says that rip is.
fn signal_frame<'a, S: UnwindSection<Bytes<'a>>>(
    return_address: Option<RegisterRule<usize>>,
    section: &S,
    cie: &CommonInformationEntry<Bytes<'a>>,
) -> Result<UnwindRule, Inexpressible> {
    let Some(RegisterRule::Expression(expression)) = return_address else {
        return Err(Inexpressible::SignalFrame);
    };
    match operations(&expression, section, cie).as_deref() {
        Some([Operation::RegisterOffset { register: X86_64::RSP, offset: SIGNAL_RIP_OFFSET, .. }]) => {
            Ok(UnwindRule::SIGNAL)
        }
        _ => Err(Inexpressible::SignalFrame),
    }
}

pub(super) fn display(rule: &UnwindRule, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if let Some(text) = display_bare(rule) {
        return f.write_str(text);
    }
    let base = X86_64::register_name(gimli::Register(rule.base.into())).unwrap_or("?");
    let offset = rule.cfa_offset;
    match RuleKind::decode(rule.kind) {
        Some(RuleKind::Cfa | RuleKind::CfaElsewhere) => write!(f, "cfa={base}{offset:+}")?,
        Some(RuleKind::CfaAt) => write!(f, "cfa=[{base}{offset:+}]+{}", u32::from(rule.scale) * 8)?,
        Some(RuleKind::Plt) => write!(f, "cfa=rsp+8 or rsp+16 from byte {}", rule.scale)?,
        _ => write!(f, "kind {}?", rule.kind)?,
    }
    match FpRule::decode(rule.fp) {
        Some(FpRule::Same) => Ok(()),
        Some(FpRule::AtCfa) => write!(f, " rbp=[cfa{:+}]", rule.fp_offset),
        Some(FpRule::AtFp) => write!(f, " rbp=[rbp{:+}]", rule.fp_offset),
        Some(FpRule::Undefined) => f.write_str(" rbp=undefined"),
        None => write!(f, " fp {}?", rule.fp),
    }?;
    match (RuleKind::decode(rule.kind), rule.scale) {
        (Some(RuleKind::Cfa | RuleKind::CfaElsewhere), words @ 1..=RBX_WORDS_MAX) => {
            write!(f, " rbx=[cfa-{}]", u32::from(words) * 8)
        }
        (Some(RuleKind::Cfa | RuleKind::CfaElsewhere), RBX_LOST) => f.write_str(" rbx=lost"),
        _ => Ok(()),
    }
}
