//! What the kernel side (`profiler-ebpf`) and the agent must agree on: records on the wire between them, counters,
//! bounds and the pure unwind step. No allocation, no dependencies, no I/O.
//!
//! ```
//! use profiler_common::wire::Frame;
//!
//! // The look-up address of a call site: the return address less one, and marked as such.
//! let frame = Frame::raw(0x7f00_0000_1235, true);
//! assert_eq!(frame.address(), 0x7f00_0000_1234);
//! assert!(frame.is_return_address());
//! ```
#![no_std]

pub mod config;
pub mod heap;
pub mod limits;
pub mod stats;
pub mod targets;
pub mod unwind;
pub mod wire;
