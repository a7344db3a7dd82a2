//! Addresses to locations: what can be looked up after the process has gone, and is equal across processes.

use std::sync::Arc;

use profiler_common::wire::{Frame, StackEnd};

use crate::{
    addr::Addr,
    drain::{KernelCut, RawSample},
    process::{Backing, Process, Processes},
    symbolize::LocationKey,
};

/// One frame of a window's stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Location {
    /// An address that the symbolizer can look up: in an executable, in generated code or in the kernel.
    Code(LocationKey),
    /// An address in memory that no executable backs.
    Unnamed {
        /// Name of the mapping, as `[vdso]`; empty where nothing is mapped.
        mapping: Arc<str>,
        /// Offset in the mapping's file; the address in the process where nothing is mapped.
        addr: Addr,
    },
    /// Not code: says at the root end why the stack has no further frame.
    Marker(StackEnd),
    /// Not code: says between the kernel's frames and those of the process why there are no more of the kernel's.
    KernelMarker(KernelCut),
}

impl Location {
    /// An address that no executable backs.
    pub(crate) fn unnamed(mapping: &str, addr: Addr) -> Self {
        Self::Unnamed { mapping: mapping.into(), addr }
    }
}

/// The sample's whole stack, leaf first: kernel frames, user frames, and a marker when something is missing. Its process
/// is in the table.
pub(crate) fn stack(raw: &RawSample, processes: &mut Processes) -> Vec<Location> {
    let kernel = raw.kernel.iter().enumerate().map(|(index, &address)| kernel_location(index, address));
    let kernel = kernel.chain(raw.kernel_cut.map(Location::KernelMarker));
    let mut stack: Vec<_> = kernel.chain(user_locations(raw, processes)).collect();
    if !raw.user_end.is_complete() {
        stack.push(Location::Marker(raw.user_end));
    }
    stack
}

/// Looks every frame up, and once more those that were not found when the process's mappings are due to be read again.
fn user_locations(raw: &RawSample, processes: &mut Processes) -> Vec<Location> {
    let locate_all = |process: Option<&Process>| -> Vec<Option<Location>> {
        raw.user.iter().map(|frame| locate(process?, Addr(frame.address()))).collect()
    };
    let mut found = locate_all(processes.known(raw.tgid));
    if found.iter().any(Option::is_none)
        && let Some(process) = processes.reread(raw.tgid)
    {
        found = locate_all(Some(process));
    }
    let nowhere = |frame: &Frame| Location::unnamed("", Addr(frame.address()));
    found
        .into_iter()
        .zip(&raw.user)
        .map(|(location, frame)| location.unwrap_or_else(|| nowhere(frame)))
        .collect()
}

/// The first kernel frame is the instruction pointer, the others are return addresses.
fn kernel_location(index: usize, address: u64) -> Location {
    let lookup = if index == 0 { address } else { address.wrapping_sub(1) };
    Location::Code(LocationKey::Kernel(Addr(lookup)))
}

fn locate(process: &Process, addr: Addr) -> Option<Location> {
    let mapping = process.mapping(addr)?;
    let offset = mapping.file_offset(addr);
    Some(match &mapping.backing {
        Backing::Anonymous => generated(process, addr),
        // How .NET maps the same code writable and executable: memfd_create(2).
        Backing::Unnamed(name) if name.starts_with("memfd:") => generated(process, addr),
        Backing::Unnamed(name) => Location::Unnamed { mapping: Arc::clone(name), addr: Addr(offset.0) },
        Backing::Executable(executable) => match executable.elf_addr(offset) {
            Some(elf_addr) => {
                let executable = Arc::clone(executable.settled());
                Location::Code(LocationKey::Native { executable, addr: elf_addr })
            }
            None => Location::unnamed(&executable.name(), Addr(offset.0)),
        },
    })
}

/// What is known of the code by now is part of its identity: the same address may be another function's later.
fn generated(process: &Process, addr: Addr) -> Location {
    let code = Arc::clone(&process.generated);
    Location::Code(LocationKey::Generated { version: code.version(), code, addr })
}
