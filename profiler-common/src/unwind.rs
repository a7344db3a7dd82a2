//! Table-driven stack unwinding: what a table is, how a row is found, and the types of one step.
//!
//! Everything here is pure and compiled for the kernel and for the host; what differs per architecture is in
//! [`x86_64`] and [`aarch64`]. A walk is a loop of three calls:
//!
//! ```text
//! address = regs.lookup_address() - load bias        rule = rules[find_row(table, address - directory start)]
//! step(rule, &mut regs, reader)                      Caller: regs are now the caller's; Stop: the walk ends here
//! ```
//!
//! The table of one executable is a two-level tree of sorted addresses, so that the kernel finds a row with plain loads
//! from two map values:
//!
//! ```text
//! Directory  bases  [0, 0x1c40, 0x3a10, ..]      first address of each leaf, relative to the directory's start
//!            leaves [17, 18, 25, ..]             number of each leaf
//! Leaf       offsets [0, 4, 0x11, ..]            first address of each row, relative to the leaf's base
//!            rules   [3, 9, 3, ..]               number of each row's rule
//! ```
//! A row holds from its address to the next row's. Code without unwind information has rows too ([`RuleKind::Gap`]).

pub mod aarch64;
pub mod mappings;
pub mod x86_64;

/// Rows of one leaf; a power of two, for the search. 512 rows make a map value of 2 KiB: 97 % full over the shared
/// libraries of a Debian host.
pub const LEAF_ROWS: usize = 1 << LEAF_ROWS_LOG2;
const LEAF_ROWS_LOG2: u32 = 9;

/// Leaves of one directory; a power of two, for the search. An executable with more has several directories.
pub const DIRECTORY_LEAVES: usize = 1 << DIRECTORY_LEAVES_LOG2;
const DIRECTORY_LEAVES_LOG2: u32 = 8;

/// Largest row offset within a leaf, in units of the architecture's `OFFSET_SHIFT`. Greater ones mean "unused row".
pub const LEAF_OFFSET_MAX: u64 = 0xfffd;

/// Offset of an unused row: greater than any key that is searched for.
pub const UNUSED_OFFSET: u16 = u16::MAX;
/// Base of an unused leaf: greater than any key that is searched for.
pub const UNUSED_BASE: u32 = u32::MAX;
/// Number of an unused leaf.
pub const UNUSED_LEAF: u32 = u32::MAX;

/// Rows of an unwind table, sorted by offset; unused rows at the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// First address of each row, relative to the leaf's base and shifted right by the architecture's `OFFSET_SHIFT`.
    /// The first one is 0, unused ones are [`UNUSED_OFFSET`].
    pub offsets: [u16; LEAF_ROWS],
    /// Number of each row's rule.
    pub rules: [u16; LEAF_ROWS],
}

/// Leaves of an unwind table, sorted by base; unused ones at the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directory {
    /// First address of each leaf, relative to the directory's start. The first one is 0, unused ones are
    /// [`UNUSED_BASE`].
    pub bases: [u32; DIRECTORY_LEAVES],
    /// Number of each leaf; [`UNUSED_LEAF`] for unused ones.
    pub leaves: [u32; DIRECTORY_LEAVES],
}

impl Leaf {
    /// A leaf without rows.
    pub const EMPTY: Self = Self { offsets: [UNUSED_OFFSET; LEAF_ROWS], rules: [0; LEAF_ROWS] };
}

impl Directory {
    /// A directory without leaves.
    pub const EMPTY: Self =
        Self { bases: [UNUSED_BASE; DIRECTORY_LEAVES], leaves: [UNUSED_LEAF; DIRECTORY_LEAVES] };
}

const _: () = assert!(size_of::<Leaf>() == 2048);
const _: () = assert!(size_of::<Directory>() == 2048);

/// How to find the caller: shared by every table row with the same unwinding. The kernel side reads it as it is.
///
/// Source: DWARF 5 §6.4.1; for the return address slot, System V ABI AMD64 §3.2.2 and AAPCS64 §6.4.6.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnwindRule {
    /// [`RuleKind`] as an integer: map memory may hold any byte.
    pub kind: u8,
    /// Register that `cfa_offset` is added to, as numbered by the psABI.
    pub base: u8,
    /// [`FpRule`]: where the caller's frame pointer is.
    pub fp: u8,
    /// The kind's small operand. [`RuleKind::CfaAt`]: `k` of `*(base + cfa_offset) + k * 8`. [`RuleKind::Plt`]: first
    /// byte of a 16-byte stub behind its push. Of the other kinds, x86-64: where the caller's rbx is
    /// ([`x86_64::RBX_SAME`]); aarch64: distance from `fp_offset` to the return address, an `i8` in units of 8 bytes.
    pub scale: u8,
    /// CFA = base register + `cfa_offset`, in bytes.
    pub cfa_offset: i32,
    /// The caller's frame pointer lies at CFA + `fp_offset` (or frame pointer + `fp_offset`), in bytes.
    pub fp_offset: i32,
}

const _: () = assert!(size_of::<UnwindRule>() == 12);

impl UnwindRule {
    /// Code whose caller cannot be found by any rule. All zero, as unwritten map memory is.
    pub const INVALID: Self = Self::bare(RuleKind::Invalid);
    /// Code without unwind information.
    pub const GAP: Self = Self::bare(RuleKind::Gap);
    /// The thread's first frame.
    pub const END: Self = Self::bare(RuleKind::End);
    /// A signal handler's return trampoline.
    pub const SIGNAL: Self = Self::bare(RuleKind::Signal);

    const fn bare(kind: RuleKind) -> Self {
        Self { kind: kind as u8, base: 0, fp: 0, scale: 0, cfa_offset: 0, fp_offset: 0 }
    }

    /// The same rule for code that moves between stacks.
    #[must_use]
    pub const fn elsewhere(self) -> Self {
        Self { kind: RuleKind::CfaElsewhere as u8, ..self }
    }

    /// Whether the rule marks code without unwind information, where the policy of the process decides between its
    /// architecture's `FRAME_POINTER` rule and the end of the walk.
    #[inline(always)]
    #[must_use]
    pub const fn is_gap(&self) -> bool {
        self.kind == RuleKind::Gap as u8
    }
}

/// What kind of frame a rule describes. Decoded with [`RuleKind::decode`], never cast.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuleKind {
    /// No rule: unwind information that the table cannot express, or memory that was never written.
    Invalid = 0,
    /// CFA = base + `cfa_offset`; the return address is in its usual stack slot.
    Cfa = 1,
    /// CFA = `*(base + cfa_offset) + scale * 8`: frames that keep their CFA in memory (dynamic realignment, assembly).
    CfaAt = 2,
    /// x86-64 procedure linkage table: CFA = rsp + 8, or rsp + 16 from byte `scale` of a 16-byte stub on.
    Plt = 3,
    /// The kernel's signal frame lies at the stack pointer and holds the registers of the interrupted code.
    Signal = 4,
    /// The return address is undefined: a thread's first frame.
    End = 5,
    /// No unwind information covers this code.
    Gap = 6,
    /// aarch64: CFA = base + `cfa_offset`; the return address is still in the link register.
    LinkRegister = 7,
    /// As [`RuleKind::Cfa`], of code that moves between stacks: the caller's frame may lie below this one. Go runs C
    /// code, its scheduler and its garbage collector on the thread's own stack, called from a goroutine's.
    CfaElsewhere = 8,
}

impl RuleKind {
    /// The kind named by a byte, `None` for a byte that names none.
    #[inline(always)]
    #[must_use]
    pub const fn decode(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Invalid),
            1 => Some(Self::Cfa),
            2 => Some(Self::CfaAt),
            3 => Some(Self::Plt),
            4 => Some(Self::Signal),
            5 => Some(Self::End),
            6 => Some(Self::Gap),
            7 => Some(Self::LinkRegister),
            8 => Some(Self::CfaElsewhere),
            _ => None,
        }
    }
}

/// Where the caller's frame pointer is. Decoded with [`FpRule::decode`], never cast.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FpRule {
    /// Still in its register.
    Same = 0,
    /// In memory at CFA + `fp_offset`.
    AtCfa = 1,
    /// In memory at this frame's frame pointer + `fp_offset`: frames whose stack pointer was realigned.
    AtFp = 2,
    /// Nowhere; taken as 0.
    Undefined = 3,
}

impl FpRule {
    /// The rule named by a byte, `None` for a byte that names none.
    #[inline(always)]
    #[must_use]
    pub const fn decode(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Same),
            1 => Some(Self::AtCfa),
            2 => Some(Self::AtFp),
            3 => Some(Self::Undefined),
            _ => None,
        }
    }
}

/// Outcome of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The registers are now the caller's.
    Caller,
    /// There is no caller, or none that can be found; the registers are as they were.
    Stop(StopReason),
}

/// Why a walk ended. Decoded with [`StopReason::decode`], never cast.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StopReason {
    /// The return address is undefined by rule: the first frame of a thread.
    End = 1,
    /// The return address is 0: the first frame of a thread whose entry code has no such rule.
    ReturnAddressZero = 2,
    /// The frame pointer is 0: the end of a chain of frame pointers (System V ABI AMD64 §3.4.1).
    FramePointerZero = 3,
    /// The address lies in no known mapping.
    NoMapping = 4,
    /// No unwind information covers the address.
    NoUnwindInformation = 5,
    /// The unwind information at the address cannot be expressed by a rule, or the rule is damaged.
    InvalidRule = 6,
    /// The rule needs a register that is only known in the innermost frame.
    RegisterLost = 7,
    /// Stack memory could not be read.
    ReadFailed = 8,
    /// The caller's frame does not lie above this one.
    NotRising = 9,
    /// The walk has taken as many frames as there is room for.
    DepthLimit = 10,
}

impl StopReason {
    /// Every reason, in the order of its number.
    pub const ALL: [Self; 10] = [
        Self::End,
        Self::ReturnAddressZero,
        Self::FramePointerZero,
        Self::NoMapping,
        Self::NoUnwindInformation,
        Self::InvalidRule,
        Self::RegisterLost,
        Self::ReadFailed,
        Self::NotRising,
        Self::DepthLimit,
    ];

    /// The reason named by a byte, `None` for a byte that names none.
    #[must_use]
    pub const fn decode(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::End),
            2 => Some(Self::ReturnAddressZero),
            3 => Some(Self::FramePointerZero),
            4 => Some(Self::NoMapping),
            5 => Some(Self::NoUnwindInformation),
            6 => Some(Self::InvalidRule),
            7 => Some(Self::RegisterLost),
            8 => Some(Self::ReadFailed),
            9 => Some(Self::NotRising),
            10 => Some(Self::DepthLimit),
            _ => None,
        }
    }

    /// The walk reached the thread's first frame: nothing is missing from the stack.
    #[must_use]
    pub const fn is_complete(self) -> bool {
        matches!(self, Self::End | Self::ReturnAddressZero | Self::FramePointerZero)
    }

    /// The name used in metrics and marker frames.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::End => "end",
            Self::ReturnAddressZero => "return_address_zero",
            Self::FramePointerZero => "frame_pointer_zero",
            Self::NoMapping => "no_mapping",
            Self::NoUnwindInformation => "no_unwind_information",
            Self::InvalidRule => "invalid_rule",
            Self::RegisterLost => "register_lost",
            Self::ReadFailed => "read_failed",
            Self::NotRising => "not_rising",
            Self::DepthLimit => "depth_limit",
        }
    }
}

/// Eight words of stack memory: what one read of a step brings.
pub type Block = [u64; 8];

/// Memory of the task being unwound: a kernel helper, or a captured stack.
pub trait ReadUser {
    /// The 8 bytes at `addr`; `None` where they cannot be read.
    fn read_u64(&mut self, addr: u64) -> Option<u64>;

    /// The 64 bytes at `addr`, in memory of the reader's own so that the step needs none; `None` where any of them
    /// cannot be read.
    fn read_block64(&mut self, addr: u64) -> Option<&Block>;
}

/// One directory with its leaves: BPF map values, or slices.
///
/// Positions are `u64` and always below [`DIRECTORY_LEAVES`] and [`LEAF_ROWS`]: the kernel's verifier proves it from
/// the search itself.
pub trait RowTable {
    /// A leaf in hand.
    type Leaf;

    /// `Directory::bases[slot]`.
    fn leaf_base(&self, slot: u64) -> u64;
    /// The leaf that `Directory::leaves[slot]` names; `None` for an unused slot or a leaf that is gone.
    fn leaf(&self, slot: u64) -> Option<Self::Leaf>;
    /// `Leaf::offsets[row]`.
    fn row_offset(leaf: &Self::Leaf, row: u64) -> u64;
    /// `Leaf::rules[row]`.
    fn row_rule(leaf: &Self::Leaf, row: u64) -> u16;

    /// 1 if `value < bound`, else 0; both are below 2^63. The kernel side states it in assembly, lest it become a
    /// branch: the verifier follows every path through a branching search.
    #[inline(always)]
    fn below(value: u64, bound: u64) -> u64 {
        value.wrapping_sub(bound) >> 63
    }
}

/// The number of the rule for `address`, which is relative to the directory's start; `None` beyond its leaves.
///
/// `offset_shift` is the architecture's `OFFSET_SHIFT`.
#[inline(always)]
#[must_use]
pub fn find_row<T: RowTable>(table: &T, address: u64, offset_shift: u32) -> Option<u16> {
    if address >= UNUSED_BASE as u64 {
        return None;
    }
    let slot = last_not_above::<DIRECTORY_LEAVES_LOG2>(address, |at| table.leaf_base(at), T::below);
    let offset = address.wrapping_sub(table.leaf_base(slot)) >> offset_shift;
    let leaf = table.leaf(slot)?;
    let key = clamp_offset::<T>(offset);
    let row = last_not_above::<LEAF_ROWS_LOG2>(key, |at| T::row_offset(&leaf, at), T::below);
    Some(T::row_rule(&leaf, row))
}

/// Position of the last of 2^`LOG2` sorted keys that is not above `key`; 0 where all are above.
///
/// One straight line once unrolled: each round adds 0 or 1 at a bit position of its own, so the result needs no mask.
#[inline(always)]
fn last_not_above<const LOG2: u32>(
    key: u64,
    key_at: impl Fn(u64) -> u64,
    below: impl Fn(u64, u64) -> u64,
) -> u64 {
    let bound = key.wrapping_add(1);
    let mut position = 0u64;
    let mut shift = LOG2;
    while shift > 0 {
        shift = shift.wrapping_sub(1);
        position = position
            .wrapping_add(below(key_at(position.wrapping_add(1 << shift)), bound).wrapping_shl(shift));
    }
    position
}

/// `offset`, or the offset just below [`UNUSED_OFFSET`] where it is greater: a leaf's last row reaches up to the next
/// leaf, however far that is. Without a branch, as the search is.
#[inline(always)]
fn clamp_offset<T: RowTable>(offset: u64) -> u64 {
    let above = T::below(LEAF_OFFSET_MAX + 1, offset);
    ((offset | above.wrapping_neg()) & UNUSED_OFFSET as u64).wrapping_sub(above)
}

/// A directory and the leaves it names by position, as the host holds them.
#[derive(Clone, Copy, Debug)]
pub struct DirectoryLeaves<'a> {
    /// The directory.
    pub directory: &'a Directory,
    /// The leaves; `Directory::leaves` holds positions in here.
    pub leaves: &'a [Leaf],
}

impl<'a> RowTable for DirectoryLeaves<'a> {
    type Leaf = &'a Leaf;

    fn leaf_base(&self, slot: u64) -> u64 {
        self.directory.bases[slot as usize].into()
    }

    fn leaf(&self, slot: u64) -> Option<&'a Leaf> {
        self.leaves.get(self.directory.leaves[slot as usize] as usize)
    }

    fn row_offset(leaf: &&'a Leaf, row: u64) -> u64 {
        leaf.offsets[row as usize].into()
    }

    fn row_rule(leaf: &&'a Leaf, row: u64) -> u16 {
        leaf.rules[row as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One leaf from `(offset, rule)` pairs.
    fn leaf(rows: &[(u16, u16)]) -> Leaf {
        let mut leaf = Leaf::EMPTY;
        for (at, &(offset, rule)) in rows.iter().enumerate() {
            leaf.offsets[at] = offset;
            leaf.rules[at] = rule;
        }
        leaf
    }

    fn directory(bases: &[u32]) -> Directory {
        let mut directory = Directory::EMPTY;
        for (at, &base) in bases.iter().enumerate() {
            directory.bases[at] = base;
            directory.leaves[at] = at as u32;
        }
        directory
    }

    #[track_caller]
    fn check(bases: &[u32], leaves: &[Leaf], address: u64, expect: Option<u16>) {
        let directory = directory(bases);
        let table = DirectoryLeaves { directory: &directory, leaves };
        assert_eq!(find_row(&table, address, 0), expect, "address {address:#x}");
    }

    #[test]
    fn a_row_holds_up_to_the_next_one() {
        let leaves = [leaf(&[(0, 1), (4, 2), (9, 3)])];
        for (address, rule) in [(0, 1), (3, 1), (4, 2), (8, 2), (9, 3), (0x1_0000, 3), (0xffff_fffe, 3)] {
            check(&[0], &leaves, address, Some(rule));
        }
    }

    #[test]
    fn a_leaf_holds_up_to_the_next_one() {
        let leaves = [leaf(&[(0, 1), (0xfffd, 2)]), leaf(&[(0, 3)])];
        for (address, rule) in
            [(0xfffc, 1), (0xfffd, 2), (0xfffe, 2), (0xffff, 2), (0x1ffff, 2), (0x20000, 3)]
        {
            check(&[0, 0x20000], &leaves, address, Some(rule));
        }
    }

    #[test]
    fn addresses_beyond_a_directory_have_no_row() {
        check(&[0], &[leaf(&[(0, 1)])], u64::from(UNUSED_BASE), None);
        check(&[0], &[leaf(&[(0, 1)])], u64::MAX, None);
        check(&[], &[], 0, None);
    }

    #[test]
    fn a_leaf_that_is_gone_has_no_row() {
        check(&[0, 0x100], &[leaf(&[(0, 1)])], 0x100, None);
    }

    #[test]
    fn a_full_leaf_and_a_full_directory_find_every_row() {
        let rows: [(u16, u16); LEAF_ROWS] = core::array::from_fn(|at| (at as u16 * 3, at as u16));
        let leaves = [leaf(&rows); DIRECTORY_LEAVES];
        let bases: [u32; DIRECTORY_LEAVES] = core::array::from_fn(|at| at as u32 * 0x800);
        for address in 0..(LEAF_ROWS as u64 * 3) {
            check(&bases, &leaves, 0x800 * 255 + address, Some((address / 3) as u16));
        }
    }

    #[test]
    fn offsets_in_units_of_an_instruction_reach_further() {
        let directory = directory(&[0]);
        let leaves = [leaf(&[(0, 1), (0xfffd, 2)])];
        let table = DirectoryLeaves { directory: &directory, leaves: &leaves };
        assert_eq!(find_row(&table, 0xfffd * 4 - 1, 2), Some(1));
        assert_eq!(find_row(&table, 0xfffd * 4, 2), Some(2));
    }

    #[test]
    fn every_stop_reason_decodes_to_itself() {
        for reason in StopReason::ALL {
            assert_eq!(StopReason::decode(reason as u8), Some(reason));
        }
        assert_eq!(StopReason::decode(0), None);
        assert_eq!(StopReason::decode(11), None);
    }

    #[test]
    fn every_byte_decodes_to_its_own_kind_or_to_none() {
        for byte in 0..=u8::MAX {
            assert!(RuleKind::decode(byte).is_none_or(|kind| kind as u8 == byte));
            assert!(FpRule::decode(byte).is_none_or(|rule| rule as u8 == byte));
        }
    }
}
