//! Where to probe an allocator: bytes of an ELF file to attach points.
//!
//! Takes the whole file as bytes, finds the allocating and freeing functions that it defines, and for each the first
//! instruction that the kernel can emulate: a breakpoint there costs a twentieth of one that must be single-stepped. A
//! function without such an instruction before its arguments are gone is refused with the reason. Not for reading files or
//! for attaching; x86-64 only.
//!
//! ```
//! let libc = std::fs::read("/proc/self/exe")?;
//! match profiler_heap::scan(&libc) {
//!     Ok(allocator) => println!("{} functions", allocator.points.len()),
//!     Err(error) => println!("{error}"),
//! }
//! # Ok::<(), std::io::Error>(())
//! ```

mod elf;
mod names;
mod point;
mod sampling;

pub use elf::{Allocator, Function, ScanError, scan};
pub use names::call_of;
pub use point::{AttachPoint, Refusal, find_point};
pub use sampling::Weight;
