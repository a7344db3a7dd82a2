//! From a row of call frame information to an [`UnwindRule`].

mod aarch64;
mod x86_64;

use std::fmt;

use gimli::{CommonInformationEntry, Operation, UnwindExpression, UnwindSection, UnwindTableRow};
use profiler_common::unwind::UnwindRule;

use crate::eh_frame::Bytes;
use crate::elf::Architecture;

/// Why a row has no rule: its code is marked [`UnwindRule::INVALID`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inexpressible {
    /// The CFA is based on a register that rules do not know.
    CfaRegister,
    /// The CFA is an expression of no known form.
    CfaExpression,
    /// The return address is not where the ABI puts it.
    ReturnAddress,
    /// The caller's frame pointer is given in no known form.
    FramePointer,
    /// An offset does not fit its field.
    Offset,
    /// A signal frame that is not the kernel's.
    SignalFrame,
    /// The call frame instructions themselves are wrong; counted once for the FDE.
    Instructions,
    /// The file has more distinct rules than [`crate::limits::RULES_PER_FILE_MAX`].
    TooManyRules,
}

impl Inexpressible {
    /// Every reason, in order.
    pub const ALL: [Self; 8] = [
        Self::CfaRegister,
        Self::CfaExpression,
        Self::ReturnAddress,
        Self::FramePointer,
        Self::Offset,
        Self::SignalFrame,
        Self::Instructions,
        Self::TooManyRules,
    ];

    /// The name used in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CfaRegister => "cfa_register",
            Self::CfaExpression => "cfa_expression",
            Self::ReturnAddress => "return_address",
            Self::FramePointer => "frame_pointer",
            Self::Offset => "offset",
            Self::SignalFrame => "signal_frame",
            Self::Instructions => "instructions",
            Self::TooManyRules => "too_many_rules",
        }
    }
}

pub(crate) fn from_row<'a, S: UnwindSection<Bytes<'a>>>(
    architecture: Architecture,
    row: &UnwindTableRow<usize>,
    section: &S,
    cie: &CommonInformationEntry<Bytes<'a>>,
) -> Result<UnwindRule, Inexpressible> {
    match architecture {
        Architecture::X86_64 => x86_64::from_row(row, section, cie),
        Architecture::Aarch64 => aarch64::from_row(row, cie),
    }
}

/// The rule of code with frame pointers.
pub(crate) const fn frame_pointer(architecture: Architecture) -> UnwindRule {
    match architecture {
        Architecture::X86_64 => profiler_common::unwind::x86_64::FRAME_POINTER,
        Architecture::Aarch64 => profiler_common::unwind::aarch64::FRAME_POINTER,
    }
}

pub(crate) const fn offset_shift(architecture: Architecture) -> u32 {
    match architecture {
        Architecture::X86_64 => profiler_common::unwind::x86_64::OFFSET_SHIFT,
        Architecture::Aarch64 => profiler_common::unwind::aarch64::OFFSET_SHIFT,
    }
}

/// Most operations of a known expression: the one of a PLT.
const OPERATIONS_MAX: usize = 9;

/// The operations of an expression, `None` where there are more than any known form has.
fn operations<'a, S: UnwindSection<Bytes<'a>>>(
    expression: &UnwindExpression<usize>,
    section: &S,
    cie: &CommonInformationEntry<Bytes<'a>>,
) -> Option<Vec<Operation<Bytes<'a>>>> {
    let mut left = expression.get(section).ok()?.operations(cie.encoding());
    let mut operations = Vec::with_capacity(OPERATIONS_MAX);
    while let Some(operation) = left.next().ok()? {
        if operations.len() == OPERATIONS_MAX {
            return None;
        }
        operations.push(operation);
    }
    Some(operations)
}

fn offset(value: i64) -> Result<i32, Inexpressible> {
    i32::try_from(value).map_err(|_| Inexpressible::Offset)
}

/// A rule as text, with the architecture's register names: `cfa=rsp+16 fp=[cfa-16]`.
#[derive(Clone, Copy, Debug)]
pub struct DisplayRule(pub Architecture, pub UnwindRule);

impl fmt::Display for DisplayRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Architecture::X86_64 => x86_64::display(&self.1, f),
            Architecture::Aarch64 => aarch64::display(&self.1, f),
        }
    }
}

/// What both architectures print alike; `None` for the kinds that have operands.
fn display_bare(rule: &UnwindRule) -> Option<&'static str> {
    match *rule {
        UnwindRule::END => Some("end"),
        UnwindRule::GAP => Some("gap"),
        UnwindRule::SIGNAL => Some("signal frame"),
        UnwindRule::INVALID => Some("invalid"),
        _ => None,
    }
}
