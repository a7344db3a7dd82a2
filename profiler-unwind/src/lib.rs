//! Bytes of an ELF file to an unwind table, as the BPF programs search it.
//!
//! Takes the whole file (or the image of a vDSO) as bytes and gives an [`UnwindTable`]: for every address of its code, the
//! rule by which [`profiler_common::unwind`]'s step finds the caller. Opens nothing and knows no process; load biases,
//! map updates and lifetimes are the caller's. x86-64 and aarch64, 64-bit little-endian files.
//!
//! The bytes are not trusted: time and memory are bounded by the constants in [`limits`], lies end in one
//! [`UnwindError`].
//!
//! ```
//! let elf = std::fs::read(std::env::current_exe()?)?;
//! let table = profiler_unwind::from_elf(&elf)?;
//! assert!(table.counts().rows > 0);
//!
//! // Rules are numbered per host: tables of many executables share them.
//! let mut rules = profiler_unwind::RuleSet::new(table.architecture());
//! let ids = rules.acquire(table.rules())?;
//! let leaves: Vec<_> = table.leaves().iter().map(|leaf| ids.renumber(leaf)).collect();
//! assert!(leaves.len() >= table.directories().len());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod eh_frame;
mod elf;
mod go;
mod known_code;
pub mod limits;
mod rule;
mod rule_set;
mod table;
pub mod vdso;

pub use elf::{Architecture, from_elf, from_elf_in_steps};
pub use rule::{DisplayRule, Inexpressible};
pub use rule_set::{RuleIds, RuleSet, RuleSetFull};
pub use table::{Counts, Source, TableDirectory, UnwindTable};

/// Why a file has no unwind table.
#[derive(Debug, thiserror::Error)]
pub enum UnwindError {
    /// The file header or the program headers cannot be read.
    #[error("read ELF headers")]
    Headers(#[source] object::read::Error),
    /// Neither x86-64 nor aarch64.
    #[error("machine {machine} is neither x86-64 nor aarch64")]
    Machine {
        /// ELF's `e_machine`.
        machine: u16,
    },
    /// No segment is executable.
    #[error("no executable segment")]
    NoCode,
    /// The executable segments are too far apart.
    #[error("code spans {bytes} bytes, more than {max}")]
    CodeTooLarge {
        /// From the first byte of code to the last.
        bytes: u64,
        /// [`limits::CODE_BYTES_MAX`].
        max: u64,
    },
    /// The file has no unwind information: neither call frame information nor a Go runtime.
    #[error("no unwind information")]
    NoUnwindInformation,
    /// The list of entries in a section breaks off.
    #[error("read {section}")]
    Malformed {
        /// Name of the section.
        section: &'static str,
        /// What is wrong.
        #[source]
        source: gimli::Error,
    },
    /// More function entries than any real executable has.
    #[error("more than {max} frame description entries")]
    TooManyFdes {
        /// [`limits::FDES_MAX`].
        max: usize,
    },
    /// More rows than any real executable has.
    #[error("more than {max} unwind rows")]
    TooManyRows {
        /// [`limits::ROWS_MAX`].
        max: usize,
    },
    /// More call frame instructions than any real executable has.
    #[error("more than {max} bytes of call frame instructions")]
    TooMuchWork {
        /// [`limits::WORK_BYTES_MAX`].
        max: u64,
    },
    /// A vDSO larger than any real one.
    #[error("vDSO of {bytes} bytes, more than {max}")]
    VdsoTooLarge {
        /// Size of the image.
        bytes: usize,
        /// [`limits::VDSO_BYTES_MAX`].
        max: usize,
    },
}
