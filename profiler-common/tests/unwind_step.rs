//! The step of both architectures over captured stacks: what each kind of rule reads, and every way it can stop.

use std::collections::BTreeMap;

use profiler_common::unwind::{Block, FpRule, ReadUser, RuleKind, Step, StopReason, UnwindRule};

/// Words of stack by address; all else cannot be read.
#[derive(Clone, Default)]
struct Captured {
    words: BTreeMap<u64, u64>,
    block: Block,
}

impl Captured {
    /// Consecutive words from an address on.
    fn new(start: u64, words: &[u64]) -> Self {
        let words = words.iter().zip(0..).map(|(&word, at)| (start + at * 8, word)).collect();
        Self { words, ..Self::default() }
    }

    fn with(mut self, start: u64, words: &[u64]) -> Self {
        self.words.extend(Self::new(start, words).words);
        self
    }

    fn without(&self, addr: u64) -> Self {
        let mut captured = self.clone();
        captured.words.remove(&addr);
        captured
    }
}

impl ReadUser for Captured {
    fn read_u64(&mut self, addr: u64) -> Option<u64> {
        self.words.get(&addr).copied()
    }

    fn read_block64(&mut self, addr: u64) -> Option<&Block> {
        for at in 0..8 {
            self.block[at] = *self.words.get(&addr.wrapping_add(at as u64 * 8))?;
        }
        Some(&self.block)
    }
}

mod x86 {
    use profiler_common::unwind::x86_64::{BaseReg, FRAME_POINTER, RBX_LOST, RBX_WORDS_MAX, Regs, step};

    use super::*;

    const SP: u64 = 0x7ffe_1000;
    const IP: u64 = 0x40_1000;
    const CALLER: u64 = 0x40_2005;

    fn regs() -> Regs {
        let mut gpr = [0xbad0_bad0; 16];
        gpr[BaseReg::Rsp as usize] = SP;
        gpr[BaseReg::Rbp as usize] = SP + 0x40;
        Regs { ip: IP, exact: 1, gpr }
    }

    fn cfa(base: BaseReg, cfa_offset: i32) -> UnwindRule {
        UnwindRule { kind: RuleKind::Cfa as u8, base: base as u8, fp: 0, scale: 0, cfa_offset, fp_offset: 0 }
    }

    /// `(ip, sp, fp, exact)` of the caller, or why there is none. A step that stops leaves the registers alone.
    #[track_caller]
    fn check(rule: UnwindRule, regs: Regs, memory: &Captured, expect: Result<(u64, u64, u64), StopReason>) {
        let mut after = regs;
        let outcome = match step(&rule, &mut after, &mut memory.clone()) {
            Step::Caller => Ok((after.ip, after.sp(), after.fp())),
            Step::Stop(reason) => {
                assert_eq!(after, regs);
                Err(reason)
            }
        };
        assert_eq!(outcome, expect, "{rule:?}");
    }

    #[test]
    fn a_return_address_on_top_of_the_stack_is_popped() {
        let memory = Captured::new(SP, &[CALLER]);
        check(cfa(BaseReg::Rsp, 8), regs(), &memory, Ok((CALLER, SP + 8, SP + 0x40)));
    }

    #[test]
    fn the_saved_frame_pointer_is_found_near_and_far_from_the_return_address() {
        // 0x100 bytes of frame, each word its own address.
        let words: Vec<u64> = (0..32).map(|at| SP + at * 8).collect();
        let memory = Captured::new(SP, &words);
        let top = SP + 0x100;
        for fp_offset in [-16, -64, -72, -256] {
            let rule = UnwindRule { fp: FpRule::AtCfa as u8, fp_offset, ..cfa(BaseReg::Rsp, 0x100) };
            check(rule, regs(), &memory, Ok((top - 8, top, top.wrapping_add_signed(fp_offset.into()))));
        }
    }

    #[test]
    fn an_odd_slot_of_the_frame_pointer_is_read_where_it_is() {
        let memory = Captured::new(SP, &[1, 2, 3, 4, 5, 6, 7, CALLER]).with(SP + 0x40 - 12, &[77]);
        let rule = UnwindRule { fp: FpRule::AtCfa as u8, fp_offset: -12, ..cfa(BaseReg::Rsp, 0x40) };
        check(rule, regs(), &memory, Ok((CALLER, SP + 0x40, 77)));
    }

    #[test]
    fn a_chain_of_frame_pointers_is_walked_to_its_end() {
        let memory = Captured::new(SP + 0x40, &[SP + 0x80, CALLER]).with(SP + 0x80, &[0, CALLER + 1]);
        let mut regs = regs();
        let mut memory = memory.clone();
        assert_eq!(step(&FRAME_POINTER, &mut regs, &mut memory), Step::Caller);
        assert_eq!((regs.ip, regs.sp(), regs.fp()), (CALLER, SP + 0x50, SP + 0x80));
        assert_eq!(regs.lookup_address(), CALLER - 1);
        assert_eq!(step(&FRAME_POINTER, &mut regs, &mut memory), Step::Caller);
        assert_eq!(regs.ip, CALLER + 1);
        assert_eq!(step(&FRAME_POINTER, &mut regs, &mut memory), Step::Stop(StopReason::FramePointerZero));
    }

    #[test]
    fn a_realigned_frame_has_its_cfa_in_memory_and_its_frame_pointer_at_rbp() {
        // gcc's DRAP: CFA = *(rbp - 8), rbp saved at rbp.
        let memory = Captured::new(SP + 0x38, &[SP + 0x100, 55]).with(SP + 0xf8, &[CALLER]);
        let rule = UnwindRule {
            kind: RuleKind::CfaAt as u8,
            fp: FpRule::AtFp as u8,
            fp_offset: 0,
            ..cfa(BaseReg::Rbp, -8)
        };
        check(rule, regs(), &memory, Ok((CALLER, SP + 0x100, 55)));
        check(rule, regs(), &memory.without(SP + 0x38), Err(StopReason::ReadFailed));
        check(rule, regs(), &memory.without(SP + 0x40), Err(StopReason::ReadFailed));
    }

    #[test]
    fn a_saved_stack_pointer_may_need_words_added() {
        // OpenSSL: CFA = *(rsp + 24) + 56.
        let memory = Captured::new(SP + 24, &[SP + 0x100]).with(SP + 0x100 + 48, &[CALLER]);
        let rule = UnwindRule { kind: RuleKind::CfaAt as u8, scale: 7, ..cfa(BaseReg::Rsp, 24) };
        check(rule, regs(), &memory, Ok((CALLER, SP + 0x100 + 56, SP + 0x40)));
    }

    #[test]
    fn a_plt_stub_has_one_more_word_once_it_has_pushed() {
        let rule = UnwindRule { kind: RuleKind::Plt as u8, scale: 11, ..cfa(BaseReg::Rsp, 8) };
        let memory = Captured::new(SP, &[CALLER, CALLER + 1]);
        for (byte, expect) in [(0, CALLER), (10, CALLER), (11, CALLER + 1), (15, CALLER + 1)] {
            let regs = Regs { ip: IP + byte, ..regs() };
            let words = expect - CALLER + 1;
            check(rule, regs, &memory, Ok((expect, SP + 8 * words, SP + 0x40)));
        }
    }

    #[test]
    fn a_signal_frame_gives_back_every_register() {
        // struct sigcontext_64: r8..r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip.
        let context: Vec<u64> = (100..117).collect();
        let memory = Captured::new(SP + 40, &context);
        let mut caller = regs();
        assert_eq!(step(&UnwindRule::SIGNAL, &mut caller, &mut memory.clone()), Step::Caller);
        let expect = Regs {
            ip: 116,
            exact: 1,
            // rax, rdx, rcx, rbx, rsi, rdi, rbp, rsp, r8..r15.
            gpr: [113, 112, 114, 111, 109, 108, 110, 115, 100, 101, 102, 103, 104, 105, 106, 107],
        };
        assert_eq!(caller, expect);
        assert_eq!(caller.lookup_address(), caller.ip);
        for missing in [40, 40 + 64, 40 + 128] {
            check(UnwindRule::SIGNAL, regs(), &memory.without(SP + missing), Err(StopReason::ReadFailed));
        }
    }

    #[test]
    fn registers_that_callees_use_are_known_in_the_innermost_frame_only() {
        let memory = Captured::new(SP, &[CALLER]);
        for register in 0..16 {
            let base = BaseReg::decode(register).unwrap();
            let mut known = regs();
            known.gpr[base as usize] = SP;
            check(
                cfa(base, 8),
                known,
                &memory,
                match base {
                    // With the stack pointer there, the frame pointer is the same.
                    BaseReg::Rbp => Ok((CALLER, SP + 8, SP)),
                    _ => Ok((CALLER, SP + 8, SP + 0x40)),
                },
            );
            if !base.is_carried() {
                check(cfa(base, 8), Regs { exact: 0, ..known }, &memory, Err(StopReason::RegisterLost));
            }
        }
    }

    /// rbx after a step by a rule that has the caller's at a place.
    #[track_caller]
    fn check_rbx(rule: UnwindRule, rbx_at: u8, memory: &Captured, expect: u64) {
        let mut after = regs();
        let step = step(&UnwindRule { scale: rbx_at, ..rule }, &mut after, &mut memory.clone());
        assert_eq!((step, after.gpr[BaseReg::Rbx as usize]), (Step::Caller, expect), "{rbx_at}");
    }

    #[test]
    fn rbx_is_carried_to_the_caller_or_lost() {
        let words: Vec<u64> = (0..8).map(|at| 500 + at).collect();
        let (memory, frame) = (Captured::new(SP, &words), cfa(BaseReg::Rsp, 64));
        check_rbx(frame, 0, &memory, 0xbad0_bad0);
        for words in 2..=RBX_WORDS_MAX {
            check_rbx(frame, words, &memory, 508 - u64::from(words));
        }
        for lost in [RBX_WORDS_MAX + 1, 100, RBX_LOST] {
            check_rbx(frame, lost, &memory, 0);
        }
        // Nothing is taken for it where the stack cannot be read as a whole.
        check_rbx(frame, 7, &memory.without(SP), 0);
        check_rbx(frame, 0, &memory.without(SP), 0xbad0_bad0);
        // The small operand of these kinds is something else.
        check_rbx(UnwindRule { kind: RuleKind::Plt as u8, ..cfa(BaseReg::Rsp, 8) }, 1, &memory, 0xbad0_bad0);
        let saved = Captured::new(SP - 8, &[SP + 40]).with(SP, &words);
        let at = UnwindRule { kind: RuleKind::CfaAt as u8, ..cfa(BaseReg::Rsp, -8) };
        check_rbx(at, 3, &saved, 0);
    }

    #[test]
    fn a_frame_based_on_rbx_needs_one_that_was_carried() {
        let memory = Captured::new(SP, &[CALLER]);
        let mut carried = Regs { exact: 0, ..regs() };
        carried.gpr[BaseReg::Rbx as usize] = SP;
        check(cfa(BaseReg::Rbx, 8), carried, &memory, Ok((CALLER, SP + 8, SP + 0x40)));
        carried.gpr[BaseReg::Rbx as usize] = 0;
        check(cfa(BaseReg::Rbx, 8), carried, &memory, Err(StopReason::RegisterLost));
        let in_memory = UnwindRule { kind: RuleKind::CfaAt as u8, ..cfa(BaseReg::Rbx, 8) };
        check(in_memory, carried, &memory, Err(StopReason::RegisterLost));
    }

    #[test]
    fn a_frame_that_does_not_rise_stops_the_walk() {
        let memory = Captured::new(SP - 64, &[CALLER; 16]);
        check(cfa(BaseReg::Rsp, 0), regs(), &memory, Err(StopReason::NotRising));
        check(cfa(BaseReg::Rsp, -8), regs(), &memory, Err(StopReason::NotRising));
        check(cfa(BaseReg::Rbp, -0x40), regs(), &memory, Err(StopReason::NotRising));
    }

    #[test]
    fn code_that_moves_between_stacks_leads_to_frames_below() {
        let (below, fp) = (SP - 0x1_0000, SP - 0x8000);
        let memory = Captured::new(below, &[fp, CALLER]);
        let mut at = regs();
        at.gpr[BaseReg::Rbp as usize] = below;
        check(FRAME_POINTER, at, &memory, Err(StopReason::NotRising));
        check(FRAME_POINTER.elsewhere(), at, &memory, Ok((CALLER, below + 16, fp)));
    }

    #[test]
    fn each_unreadable_word_that_is_needed_stops_the_walk() {
        let memory = Captured::new(SP, &[11, CALLER]);
        let rule = UnwindRule { fp: FpRule::AtCfa as u8, fp_offset: -16, ..cfa(BaseReg::Rsp, 16) };
        check(rule, regs(), &memory, Ok((CALLER, SP + 16, 11)));
        check(rule, regs(), &memory.without(SP), Err(StopReason::ReadFailed));
        check(rule, regs(), &memory.without(SP + 8), Err(StopReason::ReadFailed));
        // Not needed: only the block read wants it.
        check(cfa(BaseReg::Rsp, 16), regs(), &memory.without(SP), Ok((CALLER, SP + 16, SP + 0x40)));
    }

    #[test]
    fn the_ends_of_a_thread_are_told_apart() {
        let memory = Captured::new(SP, &[0]);
        check(UnwindRule::END, regs(), &memory, Err(StopReason::End));
        check(cfa(BaseReg::Rsp, 8), regs(), &memory, Err(StopReason::ReturnAddressZero));
        let mut ended = regs();
        ended.gpr[BaseReg::Rbp as usize] = 0;
        check(FRAME_POINTER, ended, &memory, Err(StopReason::FramePointerZero));
    }

    #[test]
    fn rules_that_say_nothing_stop_the_walk() {
        let memory = Captured::new(SP, &[CALLER]);
        check(UnwindRule::GAP, regs(), &memory, Err(StopReason::NoUnwindInformation));
        check(UnwindRule::INVALID, regs(), &memory, Err(StopReason::InvalidRule));
        let sound = cfa(BaseReg::Rsp, 8);
        for rule in [
            UnwindRule { kind: 200, ..sound },
            UnwindRule { kind: RuleKind::LinkRegister as u8, ..sound },
            UnwindRule { base: 16, ..sound },
            UnwindRule { base: 255, ..sound },
            UnwindRule { fp: 200, ..sound },
        ] {
            check(rule, regs(), &memory, Err(StopReason::InvalidRule));
        }
    }

    #[test]
    fn addresses_at_the_ends_of_memory_do_not_overflow() {
        for sp in [0, 1, u64::MAX - 7, u64::MAX] {
            for offset in [i32::MIN, -1, 0, 8, i32::MAX] {
                for kind in 0..=8 {
                    let mut regs = regs();
                    regs.gpr[BaseReg::Rsp as usize] = sp;
                    let rule = UnwindRule { kind, ..cfa(BaseReg::Rsp, offset) };
                    assert!(matches!(step(&rule, &mut regs, &mut Captured::default()), Step::Stop(_)));
                }
            }
        }
    }

    #[test]
    fn the_innermost_instruction_is_looked_up_as_it_is() {
        assert_eq!(regs().lookup_address(), IP);
        assert_eq!(Regs { exact: 0, ..regs() }.lookup_address(), IP - 1);
    }
}

mod arm {
    use profiler_common::unwind::aarch64::{ADDRESS_MASK, BaseReg, FRAME_POINTER, Regs, step};

    use super::*;

    const SP: u64 = 0xffff_e000_1000;
    const CALLER: u64 = 0x40_2004;
    /// A pointer authentication code in the upper bits.
    const SIGNED: u64 = CALLER | 0x00a5_0000_0000_0000;

    fn regs() -> Regs {
        Regs { ip: 0x40_1000, exact: 1, sp: SP, fp: SP + 0x40, lr: SIGNED }
    }

    fn rule(kind: RuleKind, base: BaseReg, cfa_offset: i32) -> UnwindRule {
        UnwindRule { kind: kind as u8, base: base as u8, fp: 0, scale: 0, cfa_offset, fp_offset: 0 }
    }

    #[track_caller]
    fn check(rule: UnwindRule, regs: Regs, memory: &Captured, expect: Result<(u64, u64, u64), StopReason>) {
        let mut after = regs;
        let outcome = match step(&rule, &mut after, &mut memory.clone()) {
            Step::Caller => Ok((after.ip, after.sp, after.fp)),
            Step::Stop(reason) => {
                assert_eq!(after, regs);
                Err(reason)
            }
        };
        assert_eq!(outcome, expect, "{rule:?}");
    }

    #[test]
    fn a_function_that_calls_nothing_returns_by_the_link_register() {
        let memory = Captured::default();
        check(rule(RuleKind::LinkRegister, BaseReg::Sp, 0), regs(), &memory, Ok((CALLER, SP, SP + 0x40)));
        check(
            rule(RuleKind::LinkRegister, BaseReg::Sp, 32),
            regs(),
            &memory,
            Ok((CALLER, SP + 32, SP + 0x40)),
        );
        let caller = Regs { exact: 0, ..regs() };
        let lost = Err(StopReason::RegisterLost);
        check(rule(RuleKind::LinkRegister, BaseReg::Sp, 32), caller, &memory, lost);
    }

    #[test]
    fn a_frame_record_holds_the_frame_pointer_and_the_return_address() {
        let record = UnwindRule {
            fp: FpRule::AtCfa as u8,
            scale: 1,
            fp_offset: -48,
            ..rule(RuleKind::Cfa, BaseReg::Sp, 48)
        };
        let whole = Captured::new(SP, &[SP + 0x80, SIGNED, 0, 0, 0, 0, 0, 0]);
        check(record, regs(), &whole, Ok((CALLER, SP + 48, SP + 0x80)));
        // At the top of a stack there are no 64 bytes to read.
        let short = Captured::new(SP, &[SP + 0x80, SIGNED]);
        check(record, regs(), &short, Ok((CALLER, SP + 48, SP + 0x80)));
        check(record, regs(), &short.without(SP), Err(StopReason::ReadFailed));
        check(record, regs(), &short.without(SP + 8), Err(StopReason::ReadFailed));
    }

    #[test]
    fn frame_pointer_and_return_address_may_lie_apart() {
        let memory = Captured::new(SP, &[1, 2, 3, SIGNED, 5, 6, 7, 8]);
        let apart = |scale: i8, fp_offset| UnwindRule {
            fp: FpRule::AtCfa as u8,
            scale: scale as u8,
            fp_offset,
            ..rule(RuleKind::Cfa, BaseReg::Sp, 64)
        };
        check(apart(2, -56), regs(), &memory, Ok((CALLER, SP + 64, 2)));
        check(apart(-2, -24), regs(), &memory, Ok((CALLER, SP + 64, 6)));
        let alone = UnwindRule { fp_offset: -40, ..rule(RuleKind::Cfa, BaseReg::Sp, 64) };
        check(alone, regs(), &memory, Ok((CALLER, SP + 64, SP + 0x40)));
    }

    #[test]
    fn a_chain_of_frame_pointers_is_walked_to_its_end() {
        let mut memory = Captured::new(SP + 0x40, &[SP + 0x80, SIGNED]).with(SP + 0x80, &[0, SIGNED + 4]);
        let mut regs = regs();
        assert_eq!(step(&FRAME_POINTER, &mut regs, &mut memory), Step::Caller);
        assert_eq!((regs.ip, regs.fp, regs.lookup_address()), (CALLER, SP + 0x80, CALLER - 1));
        assert_eq!(step(&FRAME_POINTER, &mut regs, &mut memory), Step::Caller);
        assert_eq!(step(&FRAME_POINTER, &mut regs, &mut memory), Step::Stop(StopReason::FramePointerZero));
    }

    #[test]
    fn a_signal_frame_gives_back_the_link_register() {
        // 128 bytes siginfo, 176 to uc_mcontext, fault address, then x0..x30, sp, pc.
        let saved: Vec<u64> = (0..33).map(|register| 1000 + register).collect();
        let memory = Captured::new(SP + 312, &saved);
        let mut caller = regs();
        assert_eq!(step(&UnwindRule::SIGNAL, &mut caller, &mut memory.clone()), Step::Caller);
        assert_eq!(caller, Regs { ip: 1032, exact: 1, sp: 1031, fp: 1029, lr: 1030 });
        let torn = memory.without(SP + 312 + 30 * 8);
        check(UnwindRule::SIGNAL, regs(), &torn, Err(StopReason::ReadFailed));
    }

    #[test]
    fn a_frame_that_does_not_rise_stops_the_walk() {
        let memory = Captured::new(SP, &[SP; 8]);
        let not_rising = Err(StopReason::NotRising);
        check(rule(RuleKind::LinkRegister, BaseReg::Sp, -16), regs(), &memory, not_rising);
        check(rule(RuleKind::Cfa, BaseReg::Sp, 0), Regs { exact: 0, ..regs() }, &memory, not_rising);
    }

    #[test]
    fn code_that_moves_between_stacks_leads_to_frames_below() {
        let (below, fp) = (SP - 0x1_0000, SP - 0x8000);
        let memory = Captured::new(below, &[fp, CALLER]);
        let at = Regs { fp: below, ..regs() };
        check(FRAME_POINTER, at, &memory, Err(StopReason::NotRising));
        check(FRAME_POINTER.elsewhere(), at, &memory, Ok((CALLER, below + 16, fp)));
    }

    #[test]
    fn rules_that_say_nothing_stop_the_walk() {
        let memory = Captured::new(SP, &[0; 8]);
        check(UnwindRule::END, regs(), &memory, Err(StopReason::End));
        check(UnwindRule::GAP, regs(), &memory, Err(StopReason::NoUnwindInformation));
        check(UnwindRule::INVALID, regs(), &memory, Err(StopReason::InvalidRule));
        check(rule(RuleKind::CfaAt, BaseReg::Sp, 16), regs(), &memory, Err(StopReason::InvalidRule));
        check(rule(RuleKind::Plt, BaseReg::Sp, 16), regs(), &memory, Err(StopReason::InvalidRule));
        let sound = rule(RuleKind::Cfa, BaseReg::Sp, 16);
        check(UnwindRule { base: 7, ..sound }, regs(), &memory, Err(StopReason::InvalidRule));
        check(UnwindRule { fp_offset: -8, ..sound }, regs(), &memory, Err(StopReason::ReturnAddressZero));
        check(UnwindRule { fp: 9, fp_offset: -8, ..sound }, regs(), &memory, Err(StopReason::InvalidRule));
    }

    #[test]
    fn the_mask_keeps_every_user_address() {
        assert_eq!(ADDRESS_MASK & 0x0000_ffff_ffff_f000, 0x0000_ffff_ffff_f000);
        assert_eq!(SIGNED & ADDRESS_MASK, CALLER);
    }
}
