//! Addresses by what they count from. Never a bare `u64` across modules.

/// An address in a process or in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Addr(pub(crate) u64);

/// An address as an ELF file states it: in the space of `p_vaddr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ElfAddr(pub(crate) u64);

/// A byte in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FileOffset(pub(crate) u64);
