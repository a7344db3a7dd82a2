//! One unwind step on aarch64.
//!
//! ```text
//!                  ┌──────────────────┐ ◀ CFA = the caller's sp
//!                  │ ..               │
//! CFA+fp_offset+8  │ return address   │ the frame record; in functions that call nothing the return address
//! CFA+fp_offset    │ caller's x29     │ stays in x30
//! sp ▶             └──────────────────┘
//! ```

use super::{FpRule, ReadUser, RuleKind, Step, StopReason, UnwindRule};

/// Row offsets are in instructions of 4 bytes.
pub const OFFSET_SHIFT: u32 = 2;

/// The rule of a function whose x29 points at its frame record. The caller's sp is not known from that; the end of the
/// record stands for it.
pub const FRAME_POINTER: UnwindRule = UnwindRule {
    kind: RuleKind::Cfa as u8,
    base: BaseReg::X29 as u8,
    fp: FpRule::AtCfa as u8,
    scale: 1,
    cfa_offset: 16,
    fp_offset: -16,
};

/// Bits of a return address that are address; those above may hold a pointer authentication code. User space has 48
/// bits unless it asks for more. Source: Documentation/arch/arm64/pointer-authentication.rst, memory.rst.
pub const ADDRESS_MASK: u64 = (1 << 48) - 1;

/// Registers a CFA may be based on. Source: DWARF for the Arm 64-bit Architecture, §4.1.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseReg {
    /// The frame pointer.
    X29 = 29,
    /// The stack pointer.
    Sp = 31,
}

impl BaseReg {
    /// The register with this number, `None` for one that no rule is based on.
    #[inline(always)]
    #[must_use]
    pub const fn decode(byte: u8) -> Option<Self> {
        match byte {
            29 => Some(Self::X29),
            31 => Some(Self::Sp),
            _ => None,
        }
    }
}

/// Registers of a frame.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regs {
    /// The program counter, or the return address into this frame.
    pub ip: u64,
    /// 1 where `ip` is the next instruction and `lr` is known (the innermost frame, the frame a signal interrupted); 0
    /// where `ip` is a return address.
    pub exact: u64,
    /// The stack pointer.
    pub sp: u64,
    /// x29, the frame pointer.
    pub fp: u64,
    /// x30, the link register.
    pub lr: u64,
}

impl Regs {
    /// The address to look up for this frame: inside the call instruction for a return address.
    #[inline(always)]
    #[must_use]
    pub const fn lookup_address(&self) -> u64 {
        self.ip.wrapping_sub(1).wrapping_add(self.exact)
    }
}

/// Goes from a frame to its caller by `rule`, the rule for `regs.lookup_address()`.
///
/// Reads 64 bytes of stack at most once, and 8 bytes at most four times.
#[inline(always)]
pub fn step<R: ReadUser>(rule: &UnwindRule, regs: &mut Regs, reader: &mut R) -> Step {
    let outcome = match RuleKind::decode(rule.kind) {
        Some(RuleKind::Cfa | RuleKind::CfaElsewhere) => return_address_in_memory(rule, regs, reader),
        Some(RuleKind::LinkRegister) => return_address_in_register(rule, regs, reader),
        Some(RuleKind::Signal) => return signal_frame(regs, reader),
        Some(RuleKind::End) => Err(StopReason::End),
        Some(RuleKind::Gap) => Err(StopReason::NoUnwindInformation),
        Some(RuleKind::Invalid | RuleKind::CfaAt | RuleKind::Plt) | None => Err(StopReason::InvalidRule),
    };
    match outcome {
        Ok(caller) => {
            *regs = caller;
            Step::Caller
        }
        Err(reason) => Step::Stop(reason),
    }
}

#[inline(always)]
fn cfa(rule: &UnwindRule, regs: &Regs) -> Result<u64, StopReason> {
    let base = match BaseReg::decode(rule.base) {
        Some(BaseReg::Sp) => regs.sp,
        Some(BaseReg::X29) => regs.fp,
        None => return Err(StopReason::InvalidRule),
    };
    if base == 0 {
        return Err(StopReason::FramePointerZero);
    }
    let cfa = add(base, rule.cfa_offset);
    // A function without a frame has the CFA at sp; it can only be the innermost one.
    let is_above = cfa > regs.sp || (cfa == regs.sp && regs.exact == 1);
    if !is_above && rule.kind != RuleKind::CfaElsewhere as u8 {
        return Err(StopReason::NotRising);
    }
    Ok(cfa)
}

#[inline(always)]
fn return_address_in_memory<R: ReadUser>(
    rule: &UnwindRule,
    regs: &Regs,
    reader: &mut R,
) -> Result<Regs, StopReason> {
    let cfa = cfa(rule, regs)?;
    let fp_slot = add(cfa, rule.fp_offset);
    if rule.fp == FpRule::AtCfa as u8 && rule.scale == 1 {
        // A frame record: one read brings both. At the top of a stack there may be less than 64 bytes.
        if let Some(record) = reader.read_block64(fp_slot) {
            return caller(record[1], cfa, record[0]);
        }
    }
    let distance = (rule.scale as i8 as i64 as u64).wrapping_shl(3);
    let return_address = reader.read_u64(fp_slot.wrapping_add(distance)).ok_or(StopReason::ReadFailed)?;
    caller(return_address, cfa, caller_fp(rule, regs, cfa, reader)?)
}

#[inline(always)]
fn return_address_in_register<R: ReadUser>(
    rule: &UnwindRule,
    regs: &Regs,
    reader: &mut R,
) -> Result<Regs, StopReason> {
    if regs.exact == 0 {
        return Err(StopReason::RegisterLost);
    }
    let cfa = cfa(rule, regs)?;
    caller(regs.lr, cfa, caller_fp(rule, regs, cfa, reader)?)
}

#[inline(always)]
fn caller_fp<R: ReadUser>(
    rule: &UnwindRule,
    regs: &Regs,
    cfa: u64,
    reader: &mut R,
) -> Result<u64, StopReason> {
    match FpRule::decode(rule.fp).ok_or(StopReason::InvalidRule)? {
        FpRule::Same => Ok(regs.fp),
        FpRule::AtCfa => reader.read_u64(add(cfa, rule.fp_offset)).ok_or(StopReason::ReadFailed),
        FpRule::AtFp => reader.read_u64(add(regs.fp, rule.fp_offset)).ok_or(StopReason::ReadFailed),
        FpRule::Undefined => Ok(0),
    }
}

#[inline(always)]
fn caller(return_address: u64, cfa: u64, fp: u64) -> Result<Regs, StopReason> {
    let ip = return_address & ADDRESS_MASK;
    if ip == 0 {
        return Err(StopReason::ReturnAddressZero);
    }
    Ok(Regs { ip, exact: 0, sp: cfa, fp, lr: 0 })
}

/// `sp` points at the `rt_sigframe`: 128 bytes of siginfo, then a ucontext whose registers x0..x30, sp, pc begin 184
/// bytes in.
///
/// Source: arch/arm64/include/uapi/asm/sigcontext.h and ucontext.h.
#[inline(always)]
fn signal_frame<R: ReadUser>(regs: &mut Regs, reader: &mut R) -> Step {
    const X0: u64 = 312;
    // x24 to x31 (sp), then pc.
    let block = regs.sp.wrapping_add(X0 + 24 * 8);
    let Some(ip) = reader.read_u64(block.wrapping_add(64)) else {
        return Step::Stop(StopReason::ReadFailed);
    };
    let Some(saved) = reader.read_block64(block) else { return Step::Stop(StopReason::ReadFailed) };
    *regs = Regs { ip, exact: 1, sp: saved[7], fp: saved[5], lr: saved[6] };
    Step::Caller
}

#[inline(always)]
fn add(address: u64, offset: i32) -> u64 {
    address.wrapping_add(offset as i64 as u64)
}
