//! One frame of a made-up stack, unwound twice: by the common step, and by DWARF's rules as gimli evaluates them.

use gimli::{
    AArch64, CfaRule, CommonInformationEntry, EhFrame, EndianSlice, EvaluationResult, LittleEndian, Location,
    Register, RegisterRule, UnwindExpression, UnwindTableRow, Value, Vendor, X86_64,
};
use profiler_common::unwind::{Block, ReadUser, Step, StopReason, UnwindRule, aarch64, x86_64};
use profiler_unwind::Architecture;

pub(crate) type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// Where the made-up stack begins. Memory holds higher addresses everywhere, so that frames rise.
const SP: u64 = 0x7ffd_0000_0000;

/// What lies in memory at an address: any higher address, another one for each.
fn memory(addr: u64) -> u64 {
    SP + 0x10_0000_0000 + (addr.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32)
}

struct Memory {
    block: Block,
}

impl ReadUser for Memory {
    fn read_u64(&mut self, addr: u64) -> Option<u64> {
        Some(memory(addr))
    }

    fn read_block64(&mut self, addr: u64) -> Option<&Block> {
        self.block = std::array::from_fn(|at| memory(addr.wrapping_add(at as u64 * 8)));
        Some(&self.block)
    }
}

/// The caller, or why there is none.
pub(crate) type Caller = Result<Registers, StopReason>;

/// What is carried from frame to frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    ip: u64,
    sp: u64,
    fp: u64,
    /// Of x86-64; `None` where it is not known.
    rbx: Option<u64>,
}

/// Numbers of the registers that matter, and what a return address is where nothing is said of it.
pub(crate) struct Machine {
    architecture: Architecture,
    sp: Register,
    fp: Register,
    return_address: Register,
    default_return_address: RegisterRule<usize>,
    pub(crate) vendor: Vendor,
}

impl Machine {
    pub(crate) fn new(architecture: Architecture) -> Self {
        match architecture {
            Architecture::X86_64 => Self {
                architecture,
                sp: X86_64::RSP,
                fp: X86_64::RBP,
                return_address: X86_64::RA,
                default_return_address: RegisterRule::Undefined,
                vendor: Vendor::Default,
            },
            Architecture::Aarch64 => Self {
                architecture,
                sp: AArch64::SP,
                fp: AArch64::X29,
                return_address: AArch64::X30,
                default_return_address: RegisterRule::SameValue,
                vendor: Vendor::AArch64,
            },
        }
    }

    /// Registers far enough above each other for any frame.
    fn register(&self, register: Register, ip: u64) -> Option<u64> {
        match (self.architecture, register.0) {
            _ if register == self.sp => Some(SP),
            (Architecture::X86_64, 16) => Some(ip),
            (_, number @ 0..32) => Some(SP + (u64::from(number) + 1) * 0x1_0000_0000),
            _ => None,
        }
    }

    /// The caller by a rule of the table.
    pub(crate) fn step(&self, rule: &UnwindRule, ip: u64) -> Caller {
        let register = |number| self.register(Register(number), ip).expect("there are 16 at least");
        let mut memory = Memory { block: [0; 8] };
        match self.architecture {
            Architecture::X86_64 => {
                let gpr = std::array::from_fn(|number| register(number as u16));
                let mut regs = x86_64::Regs { ip, exact: 1, gpr };
                let step = x86_64::step(rule, &mut regs, &mut memory);
                let rbx = Some(regs.gpr[x86_64::BaseReg::Rbx as usize]).filter(|&rbx| rbx != 0);
                outcome(step, Registers { ip: regs.ip, sp: regs.sp(), fp: regs.fp(), rbx })
            }
            Architecture::Aarch64 => {
                let (fp, lr) = (register(29), register(30));
                let mut regs = aarch64::Regs { ip, exact: 1, sp: SP, fp, lr };
                let step = aarch64::step(rule, &mut regs, &mut memory);
                outcome(step, Registers { ip: regs.ip, sp: regs.sp, fp: regs.fp, rbx: None })
            }
        }
    }
}

fn outcome(step: Step, caller: Registers) -> Caller {
    match step {
        Step::Caller => Ok(caller),
        Step::Stop(reason) => Err(reason),
    }
}

/// Whether a caller by the table is the one by DWARF. The table may not know rbx: the second says that it does.
#[track_caller]
pub(crate) fn compare_callers(ours: &Caller, mut expect: Caller, context: &str) -> bool {
    let mut knows_rbx = true;
    if let (Ok(ours), Ok(expect)) = (ours, &mut expect)
        && ours.rbx.is_none()
    {
        knows_rbx = expect.rbx.take().is_none();
    }
    assert_eq!(*ours, expect, "{context}");
    knows_rbx
}

/// A frame as DWARF 5 §6.4.1 sees it, all rules allowed.
pub(crate) struct Dwarf<'a, 'b> {
    pub(crate) machine: &'b Machine,
    pub(crate) section: &'b EhFrame<Bytes<'a>>,
    pub(crate) cie: &'b CommonInformationEntry<Bytes<'a>>,
    pub(crate) ip: u64,
}

impl Dwarf<'_, '_> {
    /// The caller; `None` where the rules give no value.
    pub(crate) fn caller(&self, row: &UnwindTableRow<usize>) -> Option<Caller> {
        let machine = self.machine;
        let cfa = match row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => {
                self.register(*register)?.wrapping_add_signed(*offset)
            }
            CfaRule::Expression(expression) => self.evaluate(expression, None)?,
        };
        let restore = |register, default: RegisterRule<usize>| {
            self.restore(row.register(register).unwrap_or(default), register, cfa)
        };
        let Some(ip) = restore(machine.return_address, machine.default_return_address.clone())? else {
            return Some(Err(StopReason::End));
        };
        let fp = restore(machine.fp, RegisterRule::SameValue)?.unwrap_or(0);
        // A signal frame restores the stack pointer from memory, other frames by the definition of the CFA.
        let sp = restore(machine.sp, RegisterRule::ValOffset(0))??;
        let rbx = match machine.architecture {
            Architecture::X86_64 => restore(X86_64::RBX, RegisterRule::SameValue)?,
            Architecture::Aarch64 => None,
        };
        Some(Ok(Registers { ip, sp, fp, rbx }))
    }

    fn register(&self, register: Register) -> Option<u64> {
        self.machine.register(register, self.ip)
    }

    fn restore(&self, rule: RegisterRule<usize>, register: Register, cfa: u64) -> Option<Option<u64>> {
        Some(Some(match rule {
            RegisterRule::Undefined => return Some(None),
            RegisterRule::SameValue => self.register(register)?,
            RegisterRule::Offset(offset) => memory(cfa.wrapping_add_signed(offset)),
            RegisterRule::ValOffset(offset) => cfa.wrapping_add_signed(offset),
            RegisterRule::Register(other) => self.register(other)?,
            RegisterRule::Expression(expression) => memory(self.evaluate(&expression, Some(cfa))?),
            RegisterRule::ValExpression(expression) => self.evaluate(&expression, Some(cfa))?,
            _ => return None,
        }))
    }

    fn evaluate(&self, expression: &UnwindExpression<usize>, initial: Option<u64>) -> Option<u64> {
        let mut evaluation = expression.get(self.section).ok()?.evaluation(self.cie.encoding());
        if let Some(initial) = initial {
            evaluation.set_initial_value(initial);
        }
        let mut result = evaluation.evaluate().ok()?;
        loop {
            result = match result {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresRegister { register, .. } => {
                    evaluation.resume_with_register(Value::Generic(self.register(register)?)).ok()?
                }
                EvaluationResult::RequiresMemory { address, .. } => {
                    evaluation.resume_with_memory(Value::Generic(memory(address))).ok()?
                }
                other => panic!("no such operation in call frame information: {other:?}"),
            };
        }
        match evaluation.result().first()?.location {
            Location::Address { address } => Some(address),
            ref other => panic!("the result is an address, not {other:?}"),
        }
    }
}
