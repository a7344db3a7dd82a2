//! The instruction of a function to probe.
//!
//! The kernel executes some instructions itself when their breakpoint is hit; any other it runs out of line under a
//! single-step trap, which costs 15 to 30 times as much. So the probe goes to the first instruction from the entry that is
//! emulated, if the arguments are still in registers there and nothing can get there a second time.

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};
use profiler_common::heap::Call;

/// Bytes from the entry in which a point is looked for. Prologues are shorter.
const SEARCH_BYTES: u64 = 64;

/// Bytes of a function that are searched for branches. glibc's largest allocator function has 4 KiB.
const FUNCTION_BYTES_MAX: usize = 64 << 10;

/// Registers of the first three arguments. Source: System V ABI AMD64 §3.2.3.
const ARGUMENTS: [Register; 3] = [Register::RDI, Register::RSI, Register::RDX];

/// Where to probe a function, and what to know there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachPoint {
    /// Address of the probed instruction, as the code says.
    pub address: u64,
    /// Registers that hold the arguments there, numbered by the psABI; see `profiler_common::heap::Point::arguments`.
    pub arguments: u16,
    /// Addresses that the function calls or jumps to outside of itself, ascending.
    pub callees: Vec<u64>,
    /// Addresses of words of memory that hold where it calls or jumps to, ascending.
    pub slots: Vec<u64>,
}

/// Why a function cannot be probed cheaply and rightly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refusal {
    /// The bytes are no instructions.
    #[error("the code cannot be decoded")]
    Undecodable,
    /// Control leaves, or 64 bytes pass, before an instruction that the kernel emulates.
    #[error("no instruction near the entry that the kernel emulates")]
    NothingEmulated,
    /// An argument is overwritten before.
    #[error("an argument is gone before the first instruction that the kernel emulates")]
    ArgumentLost,
    /// The stack pointer moves before, so that the return address is no longer where it points.
    #[error("the stack pointer moves before the first instruction that the kernel emulates")]
    StackMoved,
    /// The function jumps back behind its entry: the probe would count one call twice.
    #[error("the function jumps back to the probed instructions")]
    Loop,
}

/// Finds the point of the function whose `code` starts at `address`.
///
/// # Errors
/// See [`Refusal`].
pub fn find_point(code: &[u8], address: u64, call: Call) -> Result<AttachPoint, Refusal> {
    let code = code.get(..FUNCTION_BYTES_MAX.min(code.len())).unwrap_or(code);
    let (point, holders) = first_emulated(code, address)?;
    let branches = branches(code, address);
    let is_loop = |branch: &Branch| matches!(branch, Branch::Jump(to) if (address..=point).contains(to));
    if branches.iter().any(is_loop) {
        return Err(Refusal::Loop);
    }
    let end = address.saturating_add(code.len() as u64);
    let (mut callees, mut slots) = (Vec::new(), Vec::new());
    for branch in branches {
        match branch {
            Branch::Jump(to) | Branch::Call(to) if !(address..end).contains(&to) => callees.push(to),
            Branch::Jump(_) | Branch::Call(_) => {}
            Branch::Through(slot) => slots.push(slot),
        }
    }
    for addresses in [&mut callees, &mut slots] {
        addresses.sort_unstable();
        addresses.dedup();
    }
    Ok(AttachPoint { address: point, arguments: holders.encode(call)?, callees, slots })
}

/// The word that a stub of the procedure linkage table jumps through; `None` for other code.
pub(crate) fn stub_slot(code: &[u8], address: u64) -> Option<u64> {
    let mut instructions = instructions(code, address);
    let first = instructions.next()?;
    let jump = if first.mnemonic() == Mnemonic::Endbr64 { instructions.next()? } else { first };
    match Branch::of(&jump)? {
        Branch::Through(slot) if jump.flow_control() == FlowControl::IndirectBranch => Some(slot),
        _ => None,
    }
}

/// The first emulated instruction, and what holds the arguments before it runs.
fn first_emulated(code: &[u8], address: u64) -> Result<(u64, Holders), Refusal> {
    let mut holders = Holders::at_entry();
    let mut info = InstructionInfoFactory::new();
    for instruction in instructions(code, address) {
        if instruction.is_invalid() {
            return Err(Refusal::Undecodable);
        }
        if instruction.ip() - address >= SEARCH_BYTES {
            break;
        }
        if is_emulated(bytes_of(code, address, &instruction)) {
            return Ok((instruction.ip(), holders));
        }
        if instruction.flow_control() != FlowControl::Next {
            break;
        }
        holders.pass(&instruction, &mut info)?;
    }
    Err(Refusal::NothingEmulated)
}

/// Which registers hold which argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holders {
    /// By argument: registers that hold it, the first one is the best known.
    registers: [Option<Register>; 3],
    /// Copies besides, as (register, argument).
    copies: [Option<(Register, usize)>; 4],
}

impl Holders {
    fn at_entry() -> Self {
        Self { registers: ARGUMENTS.map(Some), copies: [None; 4] }
    }

    /// Follows what an instruction does to the registers.
    fn pass(&mut self, instruction: &Instruction, info: &mut InstructionInfoFactory) -> Result<(), Refusal> {
        let copied = self.copied_by(instruction);
        for used in info.info(instruction).used_registers() {
            let writes = matches!(
                used.access(),
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            );
            let register = used.register().full_register();
            if writes && register == Register::RSP {
                return Err(Refusal::StackMoved);
            }
            if writes {
                self.forget(register);
            }
        }
        if let Some((register, argument)) = copied {
            self.remember(register, argument);
        }
        Ok(())
    }

    /// `mov %rdi,%rsi`: the register that gets a copy, and of which argument.
    fn copied_by(&self, instruction: &Instruction) -> Option<(Register, usize)> {
        let is_copy = instruction.mnemonic() == Mnemonic::Mov
            && instruction.op0_kind() == OpKind::Register
            && instruction.op1_kind() == OpKind::Register
            && instruction.op0_register().is_gpr64();
        let source = is_copy.then(|| instruction.op1_register())?;
        let argument = self.argument_in(source)?;
        Some((instruction.op0_register(), argument))
    }

    fn argument_in(&self, register: Register) -> Option<usize> {
        let first = self.registers.iter().position(|&holder| holder == Some(register));
        first.or_else(|| {
            self.copies.iter().flatten().find(|(copy, _)| *copy == register).map(|&(_, argument)| argument)
        })
    }

    fn forget(&mut self, register: Register) {
        for copy in &mut self.copies {
            if copy.is_some_and(|(holder, _)| holder == register) {
                *copy = None;
            }
        }
        for (argument, holder) in self.registers.iter_mut().enumerate() {
            if *holder == Some(register) {
                let copy = self.copies.iter_mut().find(|copy| copy.is_some_and(|(_, of)| of == argument));
                *holder = copy.and_then(Option::take).map(|(register, _)| register);
            }
        }
    }

    fn remember(&mut self, register: Register, argument: usize) {
        if let Some(free) = self.copies.iter_mut().find(|copy| copy.is_none()) {
            *free = Some((register, argument));
        }
    }

    /// The registers of the arguments that the call has.
    fn encode(&self, call: Call) -> Result<u16, Refusal> {
        let count = match call {
            Call::Allocate | Call::Free => 1,
            Call::AllocateArray | Call::Reallocate => 2,
            Call::AllocateAligned | Call::AllocateInto | Call::ReallocateArray => 3,
        };
        let mut arguments = 0;
        for (index, holder) in self.registers.iter().enumerate().take(count) {
            let is_needed =
                !matches!((call, index), (Call::AllocateAligned, 0 | 2) | (Call::AllocateInto, 1));
            let number = holder.and_then(number);
            match number {
                Some(number) => arguments |= number << (4 * index),
                None if is_needed => return Err(Refusal::ArgumentLost),
                None => {}
            }
        }
        Ok(arguments)
    }
}

/// A register's number in the psABI; of those that the kernel side looks at. Source: System V ABI AMD64 §3.6.2.
fn number(register: Register) -> Option<u16> {
    Some(match register {
        Register::RAX => 0,
        Register::RDX => 1,
        Register::RCX => 2,
        Register::RSI => 4,
        Register::RDI => 5,
        Register::R8 => 8,
        Register::R9 => 9,
        _ => return None,
    })
}

/// Whether every kernel since 5.0 executes the instruction itself. Source: arch/x86/kernel/uprobes.c: branch_setup_xol_ops,
/// push_setup_xol_ops. Newer ones know more.
fn is_emulated(bytes: &[u8]) -> bool {
    matches!(
        bytes,
        // push, nop, jmp, jcc, jmp or call, jcc
        [0x50..=0x57]
            | [0x41, 0x50..=0x57]
            | [0x90]
            | [0xeb | 0x70..=0x7f, _]
            | [0xe9 | 0xe8, _, _, _, _]
            | [0x0f, 0x80..=0x8f, _, _, _, _]
    )
}

/// Where an instruction leads besides to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Branch {
    Call(u64),
    Jump(u64),
    /// To what the word at this address holds.
    Through(u64),
}

impl Branch {
    fn of(instruction: &Instruction) -> Option<Self> {
        let is_near = instruction.op0_kind() == OpKind::NearBranch64;
        Some(match instruction.flow_control() {
            FlowControl::Call if is_near => Self::Call(instruction.near_branch64()),
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch if is_near => {
                Self::Jump(instruction.near_branch64())
            }
            FlowControl::IndirectCall | FlowControl::IndirectBranch
                if instruction.is_ip_rel_memory_operand() =>
            {
                Self::Through(instruction.ip_rel_memory_address())
            }
            _ => return None,
        })
    }
}

fn branches(code: &[u8], address: u64) -> Vec<Branch> {
    instructions(code, address).filter_map(|instruction| Branch::of(&instruction)).collect()
}

fn instructions(code: &[u8], address: u64) -> impl Iterator<Item = Instruction> + '_ {
    let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
    std::iter::from_fn(move || decoder.can_decode().then(|| decoder.decode()))
}

fn bytes_of<'a>(code: &'a [u8], address: u64, instruction: &Instruction) -> &'a [u8] {
    let start = usize::try_from(instruction.ip() - address).unwrap_or(usize::MAX);
    start.checked_add(instruction.len()).and_then(|end| code.get(start..end)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AT: u64 = 0x1000;
    const RDI: u16 = 5;
    const RSI: u16 = 4;
    const RDX: u16 = 1;

    #[track_caller]
    fn check(code: &[u8], call: Call, expect: Result<(u64, u16), Refusal>) {
        let found = find_point(code, AT, call);
        assert_eq!(found.map(|point| (point.address - AT, point.arguments)), expect, "{code:02x?}");
    }

    #[test]
    fn a_push_at_the_entry_is_the_point() {
        // glibc 2.36 malloc: push %r12; mov %rdi,%rbp
        check(&[0x41, 0x54, 0x48, 0x89, 0xfd], Call::Allocate, Ok((0, RDI)));
        check(&[0x55, 0xc3], Call::Reallocate, Ok((0, RDI | RSI << 4)));
    }

    #[test]
    fn instructions_that_keep_the_arguments_are_passed() {
        // glibc 2.36 free: test %rdi,%rdi; je
        check(&[0x48, 0x85, 0xff, 0x74, 0x10], Call::Free, Ok((3, RDI)));
        // endbr64; push %rbx
        check(&[0xf3, 0x0f, 0x1e, 0xfa, 0x53], Call::Allocate, Ok((4, RDI)));
        // cmp $0x10,%rdi; ja rel32
        check(&[0x48, 0x83, 0xff, 0x10, 0x0f, 0x87, 0, 1, 0, 0], Call::Free, Ok((4, RDI)));
    }

    #[test]
    fn a_copied_argument_is_followed() {
        // mimalloc's malloc: mov %rdi,%rsi; mov %fs:0,%rdi; ja
        let code = [0x48, 0x89, 0xfe, 0x64, 0x48, 0x8b, 0x3c, 0x25, 0, 0, 0, 0, 0x77, 0x05];
        check(&code, Call::Allocate, Ok((12, RSI)));
        check(&code, Call::Reallocate, Err(Refusal::ArgumentLost));
    }

    #[test]
    fn only_arguments_that_matter_must_be_there() {
        // xor %edi,%edi; push %rbx
        let code = [0x31, 0xff, 0x53];
        check(&code, Call::AllocateAligned, Ok((2, RSI << 4 | RDX << 8)));
        check(&code, Call::AllocateInto, Err(Refusal::ArgumentLost));
        check(&code, Call::Free, Err(Refusal::ArgumentLost));
    }

    #[test]
    fn a_write_to_a_part_of_a_register_is_a_write() {
        // mov $1,%dil; push %rbx
        check(&[0x40, 0xb7, 0x01, 0x53], Call::Free, Err(Refusal::ArgumentLost));
    }

    #[test]
    fn a_return_address_that_is_elsewhere_is_refused() {
        // sub $8,%rsp; je
        check(&[0x48, 0x83, 0xec, 0x08, 0x74, 0x02], Call::Allocate, Err(Refusal::StackMoved));
    }

    #[test]
    fn functions_that_end_first_are_refused() {
        check(&[0x48, 0x89, 0xf8, 0xc3], Call::Allocate, Err(Refusal::NothingEmulated));
        // jmp *0x1234(%rip): a stub of the procedure linkage table
        check(&[0xff, 0x25, 0x34, 0x12, 0, 0], Call::Free, Err(Refusal::NothingEmulated));
        check(&[], Call::Free, Err(Refusal::NothingEmulated));
        check(&[0x06], Call::Free, Err(Refusal::Undecodable));
    }

    #[test]
    fn a_push_that_older_kernels_single_step_is_passed_over() {
        // push with an operand size prefix moves the stack pointer all the same
        check(&[0x66, 0x53, 0x53], Call::Free, Err(Refusal::StackMoved));
    }

    #[test]
    fn a_loop_to_the_point_would_count_twice() {
        // test %rdi,%rdi; je +2; jmp entry
        check(&[0x48, 0x85, 0xff, 0x74, 0x02, 0xeb, 0xf9], Call::Free, Err(Refusal::Loop));
        // test %rdi,%rdi; je +2; jmp behind the point
        check(&[0x48, 0x85, 0xff, 0x74, 0x02, 0xeb, 0xfe], Call::Free, Ok((3, RDI)));
    }

    #[test]
    fn calls_and_jumps_to_other_functions_are_told() {
        // push %rbx; call +0x100; call *0x40(%rip); jmp -0x200
        let code = [0x53, 0xe8, 0, 1, 0, 0, 0xff, 0x15, 0x40, 0, 0, 0, 0xe9, 0, 0xfe, 0xff, 0xff];
        let point = find_point(&code, AT, Call::Allocate).expect("a push");
        assert_eq!(point.callees, [AT + 17 - 0x200, AT + 6 + 0x100]);
        assert_eq!(point.slots, [AT + 12 + 0x40]);
    }

    #[test]
    fn stubs_are_told_from_other_code() {
        // jmp *0x1234(%rip), plain and behind endbr64
        assert_eq!(stub_slot(&[0xff, 0x25, 0x34, 0x12, 0, 0], AT), Some(AT + 6 + 0x1234));
        let behind_endbr = [0xf3, 0x0f, 0x1e, 0xfa, 0xf2, 0xff, 0x25, 0x34, 0x12, 0, 0];
        assert_eq!(stub_slot(&behind_endbr, AT), Some(AT + 11 + 0x1234));
        assert_eq!(stub_slot(&[0xff, 0x15, 0x34, 0x12, 0, 0], AT), None, "a call");
        assert_eq!(stub_slot(&[0x53, 0xff, 0x25, 0x34, 0x12, 0, 0], AT), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_search_panic(code in proptest::collection::vec(any::<u8>(), 0..200), at in any::<u64>()) {
            let _ = find_point(&code, at, Call::AllocateInto);
        }
    }
}
