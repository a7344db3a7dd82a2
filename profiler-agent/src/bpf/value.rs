//! What the maps hold, as aya takes it.

use aya::Pod;
use profiler_common::{
    heap::{Hits, LiveKey, Point, Target},
    targets::Targets,
    unwind::{
        Directory, Leaf, UnwindRule,
        mappings::{MappingChunk, ProcessEntry},
    },
};

/// A map key or value of integers without padding.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(super) struct Value<T>(pub(super) T);

/// Types that `profiler_common` lays out for the kernel: integers only, no implicit padding, sizes asserted there.
pub(super) trait Shared: Copy + 'static {}
impl Shared for Directory {}
impl Shared for Hits {}
impl Shared for Leaf {}
impl Shared for LiveKey {}
impl Shared for MappingChunk {}
impl Shared for Point {}
impl Shared for ProcessEntry {}
impl Shared for Target {}
impl Shared for Targets {}
impl Shared for UnwindRule {}

// SAFETY: every `Shared` type consists of integers without padding, so that all of its bytes may be copied out, and any
// bytes are a value.
unsafe impl<T: Shared> Pod for Value<T> {}
