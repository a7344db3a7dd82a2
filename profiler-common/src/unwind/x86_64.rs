//! One unwind step on x86-64.
//!
//! ```text
//!         ┌──────────────────┐ ◀ CFA = the caller's rsp after the return
//! CFA-8   │ return address   │
//! CFA-16  │ caller's rbp ?   │ most often here, if anywhere
//! CFA-56  │ caller's rbx ?   │ at the lowest here: the last of six that compilers push
//!         │ ..               │
//! rsp ▶   └──────────────────┘
//! ```
//!
//! Three registers are carried from frame to frame. rbx is one of them for the sake of glibc's `_dl_runtime_resolve`, the
//! only code that is based on another register than rsp and rbp while it calls others.

use super::{Block, FpRule, ReadUser, RuleKind, Step, StopReason, UnwindRule};

/// Row offsets are in bytes.
pub const OFFSET_SHIFT: u32 = 0;

/// The rule of a function that begins with `push rbp; mov rbp, rsp`, anywhere but in its first and last instructions.
pub const FRAME_POINTER: UnwindRule = UnwindRule {
    kind: RuleKind::Cfa as u8,
    base: BaseReg::Rbp as u8,
    fp: FpRule::AtCfa as u8,
    scale: RBX_LOST,
    cfa_offset: 16,
    fp_offset: -16,
};

/// [`UnwindRule::scale`] of [`RuleKind::Cfa`] and [`RuleKind::CfaElsewhere`]: the caller's rbx is still in its register.
pub const RBX_SAME: u8 = 0;
/// The same: the caller's rbx is in no place that a rule can name.
pub const RBX_LOST: u8 = u8::MAX;
/// The same: it is so many words below the CFA, and no more than these.
pub const RBX_WORDS_MAX: u8 = 8;

/// General-purpose registers. Source: System V ABI AMD64 §3.6.2, figure 3.36 (DWARF register numbers).
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the registers say all")]
pub enum BaseReg {
    Rax = 0,
    Rdx = 1,
    Rcx = 2,
    Rbx = 3,
    Rsi = 4,
    Rdi = 5,
    Rbp = 6,
    Rsp = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

impl BaseReg {
    /// The register with this number, `None` for one that is no general-purpose register.
    #[inline(always)]
    #[must_use]
    pub const fn decode(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Rax),
            1 => Some(Self::Rdx),
            2 => Some(Self::Rcx),
            3 => Some(Self::Rbx),
            4 => Some(Self::Rsi),
            5 => Some(Self::Rdi),
            6 => Some(Self::Rbp),
            7 => Some(Self::Rsp),
            8 => Some(Self::R8),
            9 => Some(Self::R9),
            10 => Some(Self::R10),
            11 => Some(Self::R11),
            12 => Some(Self::R12),
            13 => Some(Self::R13),
            14 => Some(Self::R14),
            15 => Some(Self::R15),
            _ => None,
        }
    }

    /// A step carries the register over to the caller.
    #[inline(always)]
    #[must_use]
    pub const fn is_carried(self) -> bool {
        matches!(self, Self::Rsp | Self::Rbp | Self::Rbx)
    }
}

/// Registers of a frame.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regs {
    /// The instruction pointer, or the return address into this frame.
    pub ip: u64,
    /// 1 where `ip` is the next instruction and every register is known (the innermost frame, the frame a signal
    /// interrupted); 0 where `ip` is a return address and only `rsp`, `rbp` and, unless it is 0, `rbx` are known.
    pub exact: u64,
    /// General-purpose registers, numbered as in [`BaseReg`].
    pub gpr: [u64; 16],
}

impl Regs {
    /// The stack pointer.
    #[inline(always)]
    #[must_use]
    pub const fn sp(&self) -> u64 {
        self.gpr[BaseReg::Rsp as usize]
    }

    /// The frame pointer.
    #[inline(always)]
    #[must_use]
    pub const fn fp(&self) -> u64 {
        self.gpr[BaseReg::Rbp as usize]
    }

    /// The address to look up for this frame. Less one for a return address: a call that never returns may be the last
    /// instruction of its function.
    #[inline(always)]
    #[must_use]
    pub const fn lookup_address(&self) -> u64 {
        self.ip.wrapping_sub(1).wrapping_add(self.exact)
    }

    #[inline(always)]
    const fn rbx(&self) -> u64 {
        self.gpr[BaseReg::Rbx as usize]
    }

    #[inline(always)]
    fn enter_caller(&mut self, ip: u64, sp: u64, saved: Saved) {
        self.ip = ip;
        self.exact = 0;
        self.gpr[BaseReg::Rsp as usize] = sp;
        self.gpr[BaseReg::Rbp as usize] = saved.fp;
        self.gpr[BaseReg::Rbx as usize] = saved.rbx;
    }
}

/// What a caller has in the registers that it expects back.
struct Saved {
    fp: u64,
    /// 0 where it is lost.
    rbx: u64,
}

/// Goes from a frame to its caller by `rule`, the rule for `regs.lookup_address()`.
///
/// Reads 64 bytes of stack at most twice, and 8 bytes at most three times.
#[inline(always)]
pub fn step<R: ReadUser>(rule: &UnwindRule, regs: &mut Regs, reader: &mut R) -> Step {
    let (outcome, rbx_at) = match RuleKind::decode(rule.kind) {
        Some(RuleKind::Cfa | RuleKind::CfaElsewhere) => (cfa_from_register(rule, regs), rule.scale),
        Some(RuleKind::CfaAt) => (cfa_from_memory(rule, regs, reader), RBX_LOST),
        Some(RuleKind::Plt) => (Ok(cfa_in_plt(rule, regs)), RBX_SAME),
        Some(RuleKind::Signal) => return signal_frame(regs, reader),
        Some(RuleKind::End) => return Step::Stop(StopReason::End),
        Some(RuleKind::Gap) => return Step::Stop(StopReason::NoUnwindInformation),
        Some(RuleKind::Invalid | RuleKind::LinkRegister) | None => {
            return Step::Stop(StopReason::InvalidRule);
        }
    };
    match outcome.and_then(|cfa| pop_frame(rule, rbx_at, regs, cfa, reader)) {
        Ok(()) => Step::Caller,
        Err(reason) => Step::Stop(reason),
    }
}

#[inline(always)]
fn base_value(rule: &UnwindRule, regs: &Regs) -> Result<u64, StopReason> {
    let base = BaseReg::decode(rule.base).ok_or(StopReason::InvalidRule)?;
    if regs.exact == 0 && !base.is_carried() {
        return Err(StopReason::RegisterLost);
    }
    let value = regs.gpr[(base as usize) & 15];
    if value == 0 && rule.base == BaseReg::Rbx as u8 {
        return Err(StopReason::RegisterLost);
    }
    Ok(value)
}

#[inline(always)]
fn cfa_from_register(rule: &UnwindRule, regs: &Regs) -> Result<u64, StopReason> {
    let base = base_value(rule, regs)?;
    if base == 0 {
        return Err(StopReason::FramePointerZero);
    }
    Ok(add(base, rule.cfa_offset))
}

#[inline(always)]
fn cfa_from_memory<R: ReadUser>(rule: &UnwindRule, regs: &Regs, reader: &mut R) -> Result<u64, StopReason> {
    let base = base_value(rule, regs)?;
    let saved = reader.read_u64(add(base, rule.cfa_offset)).ok_or(StopReason::ReadFailed)?;
    Ok(saved.wrapping_add((rule.scale as u64).wrapping_shl(3)))
}

/// The lazy stub of binutils: `jmp *GOT; push INDEX; jmp PLT0` in 16 bytes, so that the push shows in the address.
#[inline(always)]
fn cfa_in_plt(rule: &UnwindRule, regs: &Regs) -> u64 {
    let pushed = (regs.ip & 15 >= rule.scale as u64) as u64;
    regs.sp().wrapping_add(8).wrapping_add(pushed.wrapping_shl(3))
}

#[inline(always)]
fn pop_frame<R: ReadUser>(
    rule: &UnwindRule,
    rbx_at: u8,
    regs: &mut Regs,
    cfa: u64,
    reader: &mut R,
) -> Result<(), StopReason> {
    if cfa <= regs.sp() && rule.kind != RuleKind::CfaElsewhere as u8 {
        return Err(StopReason::NotRising);
    }
    let fp_rule = FpRule::decode(rule.fp).ok_or(StopReason::InvalidRule)?;
    // One read brings the return address and, nearly always, the saved registers.
    let (return_address, near_fp, near_rbx) = match reader.read_block64(cfa.wrapping_sub(64)) {
        Some(block) => (block[7], block_slot(block, rule.fp_offset), block_rbx(block, rbx_at)),
        None => (reader.read_u64(cfa.wrapping_sub(8)).ok_or(StopReason::ReadFailed)?, None, 0),
    };
    let rbx = if rbx_at == RBX_SAME { regs.rbx() } else { near_rbx };
    let fp = match fp_rule {
        FpRule::Same => regs.fp(),
        FpRule::AtCfa => match near_fp {
            Some(fp) => fp,
            None => reader.read_u64(add(cfa, rule.fp_offset)).ok_or(StopReason::ReadFailed)?,
        },
        FpRule::AtFp => reader.read_u64(add(regs.fp(), rule.fp_offset)).ok_or(StopReason::ReadFailed)?,
        FpRule::Undefined => 0,
    };
    if return_address == 0 {
        return Err(StopReason::ReturnAddressZero);
    }
    regs.enter_caller(return_address, cfa, Saved { fp, rbx });
    Ok(())
}

/// The caller's rbx in the 64 bytes below the CFA; 0 where it is not there.
#[inline(always)]
fn block_rbx(block: &Block, rbx_at: u8) -> u64 {
    if rbx_at > RBX_WORDS_MAX {
        return 0;
    }
    block[(RBX_WORDS_MAX.wrapping_sub(rbx_at) & 7) as usize]
}

/// The word at CFA + `offset` in the 64 bytes below the CFA, if it is one of them.
#[inline(always)]
fn block_slot(block: &Block, offset: i32) -> Option<u64> {
    let at = (offset as i64 as u64).wrapping_add(64);
    if at > 56 || at & 7 != 0 {
        return None;
    }
    Some(block[((at >> 3) & 7) as usize])
}

/// `rsp` points at the `ucontext` here: the return into the trampoline has popped `pretcode`.
///
/// Source: arch/x86/include/uapi/asm/sigcontext.h: struct sigcontext_64 at `uc_mcontext`, 40 bytes into the ucontext:
/// r8..r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip.
#[inline(always)]
fn signal_frame<R: ReadUser>(regs: &mut Regs, reader: &mut R) -> Step {
    let context = regs.sp().wrapping_add(40);
    let Some(ip) = reader.read_u64(context.wrapping_add(128)) else {
        return Step::Stop(StopReason::ReadFailed);
    };
    let mut gpr = [0u64; 16];
    let Some(block) = reader.read_block64(context) else { return Step::Stop(StopReason::ReadFailed) };
    gpr[8] = block[0];
    gpr[9] = block[1];
    gpr[10] = block[2];
    gpr[11] = block[3];
    gpr[12] = block[4];
    gpr[13] = block[5];
    gpr[14] = block[6];
    gpr[15] = block[7];
    let Some(block) = reader.read_block64(context.wrapping_add(64)) else {
        return Step::Stop(StopReason::ReadFailed);
    };
    gpr[BaseReg::Rdi as usize] = block[0];
    gpr[BaseReg::Rsi as usize] = block[1];
    gpr[BaseReg::Rbp as usize] = block[2];
    gpr[BaseReg::Rbx as usize] = block[3];
    gpr[BaseReg::Rdx as usize] = block[4];
    gpr[BaseReg::Rax as usize] = block[5];
    gpr[BaseReg::Rcx as usize] = block[6];
    gpr[BaseReg::Rsp as usize] = block[7];
    *regs = Regs { ip, exact: 1, gpr };
    Step::Caller
}

#[inline(always)]
fn add(address: u64, offset: i32) -> u64 {
    address.wrapping_add(offset as i64 as u64)
}
