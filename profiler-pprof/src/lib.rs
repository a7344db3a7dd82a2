//! The pprof model: what a profile is while it travels from the agent to the store and to other tools.
//!
//! Takes stacks, values and labels ([`ProfileBuilder`]) or the bytes of a profile ([`decode()`]). Gives
//! [`proto::Profile`] values, their bytes ([`encode()`], [`encode_gzip`]), their relations checked
//! ([`check()`]), their sums and differences ([`merge`], [`diff`], [`scale`]), and the request that carries
//! them to a backend ([`push`]).
//!
//! Not for: sampling, symbolizing, or storing. Nothing here opens a file, asks for the time, or talks to the
//! network. The legacy text formats of pprof are not read.
//!
//! The format is google/pprof `proto/profile.proto` with one field of our own, `Location.kind = 1000`
//! ([`FrameKind`]), which other readers skip.
//!
//! ```
//! use profiler_pprof::{
//!     FrameKind, FunctionSpec, LabelSpec, LineSpec, LocationSpec, MappingSpec, ProfileBuilder, TypeSpec,
//!     check, decode, encode_gzip,
//! };
//!
//! let cpu = TypeSpec::new("cpu", "nanoseconds");
//! let mut builder = ProfileBuilder::new(&[TypeSpec::new("samples", "count"), cpu], cpu, 10_000_000);
//! builder.default_sample_type("cpu");
//! builder.duration_ns(10_000_000_000);
//!
//! let app = builder.mapping(&MappingSpec {
//!     start: 0x40_0000, limit: 0x50_0000, offset: 0, filename: "/usr/bin/app", build_id: "c0ffee",
//! });
//! let work = FunctionSpec { name: "work", system_name: "_Z4workv", filename: "work.cc", start_line: 10 };
//! let leaf = builder.location(&LocationSpec {
//!     mapping: Some(app),
//!     address: 0x40_1000,
//!     kind: FrameKind::Native,
//!     is_folded: false,
//!     lines: &[LineSpec { function: work, line: 12, column: 0 }],
//! });
//! builder.sample(&[leaf], &[2, 20_000_000], &[LabelSpec::text("comm", "app")]);
//! builder.sample(&[leaf], &[1, 10_000_000], &[LabelSpec::text("comm", "app")]);
//!
//! let profile = builder.finish();
//! check(&profile)?;
//! assert_eq!(profile.sample.len(), 1);
//! assert_eq!(profile.sample[0].value, [3, 30_000_000]);
//! assert_eq!(decode(&encode_gzip(&profile), &Default::default())?, profile);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod builder;
pub mod check;
pub mod decode;
pub mod encode;
#[cfg(test)]
mod fixture;
mod intern;
pub mod kind;
pub mod ops;
pub mod proto;
pub mod push;
mod text;
mod wire;

pub use builder::{
    FunctionSpec, LabelSpec, LabelValue, LineSpec, LocationId, LocationSpec, MappingId, MappingSpec,
    ProfileBuilder, TypeSpec,
};
pub use check::{CheckError, check};
pub use decode::{DecodeError, DecodeLimits, decode};
pub use encode::{Gzip, encode, encode_gzip};
pub use kind::FrameKind;
pub use ops::{Merger, OpsError, diff, merge, scale};
