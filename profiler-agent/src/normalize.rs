//! Addresses to locations: what can be looked up after the process has gone, and is equal across processes.

use std::sync::Arc;

use profiler_common::wire::{Frame, StackEnd};

use crate::{
    addr::Addr,
    drain::RawSample,
    process::{Backing, Process, Processes},
    symbolize::LocationKey,
};

/// One frame of a window's stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Location {
    /// An address that the symbolizer can look up: in an executable or in the kernel.
    Code(LocationKey),
    /// An address in memory that no executable backs.
    Unnamed {
        /// Name of the mapping: `[vdso]`, `//anon` for generated code; empty where nothing is mapped.
        mapping: Arc<str>,
        /// Address in the process.
        addr: Addr,
    },
    /// Not code: says at the root end why the stack has no further frame.
    Marker(StackEnd),
}

impl Location {
    /// An address that no executable backs.
    pub(crate) fn unnamed(mapping: &str, addr: Addr) -> Self {
        Self::Unnamed { mapping: mapping.into(), addr }
    }
}

/// The sample's whole stack, leaf first: kernel frames, user frames, and a marker when something is missing.
pub(crate) fn stack(raw: &RawSample, processes: &mut Processes) -> Vec<Location> {
    let kernel = raw.kernel.iter().enumerate().map(|(index, &address)| kernel_location(index, address));
    let mut stack: Vec<_> = kernel.collect();
    for &frame in &raw.user {
        stack.push(user_location(raw, frame, processes));
    }
    if !raw.user_end.is_complete() {
        stack.push(Location::Marker(raw.user_end));
    }
    stack
}

/// The first kernel frame is the instruction pointer, the others are return addresses.
fn kernel_location(index: usize, address: u64) -> Location {
    let lookup = if index == 0 { address } else { address.wrapping_sub(1) };
    Location::Code(LocationKey::Kernel(Addr(lookup)))
}

fn user_location(raw: &RawSample, frame: Frame, processes: &mut Processes) -> Location {
    let addr = Addr(frame.address());
    let known = locate(processes.get(raw.tgid, raw.start_ns, ""), addr);
    let found = known.or_else(|| locate(processes.reread(raw.tgid)?, addr));
    found.unwrap_or_else(|| Location::unnamed("", addr))
}

fn locate(process: &Process, addr: Addr) -> Option<Location> {
    let mapping = process.mapping(addr)?;
    Some(match &mapping.backing {
        Backing::Unnamed(name) => Location::Unnamed { mapping: Arc::clone(name), addr },
        Backing::Executable(executable) => match executable.elf_addr(mapping.file_offset(addr)) {
            Some(elf_addr) => {
                Location::Code(LocationKey::Native { executable: Arc::clone(executable), addr: elf_addr })
            }
            None => Location::unnamed(&executable.name(), addr),
        },
    })
}
