//! Binaries of the Go tool chain.
//!
//! Go code has no `.eh_frame` and keeps frame pointers (on amd64 since Go 1.7, on arm64 since 1.12), so all that C code
//! in the same binary does not describe is unwound by them. They lead from the thread's stack back to the goroutine's,
//! which lies anywhere.

use object::elf::PT_NOTE;
use profiler_common::unwind::UnwindRule;

use crate::elf::{Architecture, Elf};

/// Sections that only Go's linker writes; the first holds the tool chain's version and survives `-ldflags=-s -w`.
const SECTIONS: [&str; 3] = [".go.buildinfo", ".gopclntab", ".note.go.buildid"];

/// Owner field of Go's build id note: name size 4, then (after description size and type) the name.
const NOTE_NAME: &[u8] = b"Go\0\0";

pub(crate) fn is_go(elf: &Elf<'_>) -> bool {
    SECTIONS.iter().any(|name| elf.has_section(name)) || has_go_note(elf)
}

/// For files without a section table: the build id note comes first in Go's note segment.
fn has_go_note(elf: &Elf<'_>) -> bool {
    elf.segment(PT_NOTE).is_some_and(|note| note.bytes.get(12..16) == Some(NOTE_NAME))
}

/// The rule of code that nothing describes.
pub(crate) fn gap(architecture: Architecture) -> UnwindRule {
    crate::rule::frame_pointer(architecture).elsewhere()
}
