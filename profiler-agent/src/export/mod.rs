//! Closed windows to destinations: encode, queue, upload.

mod collect;
mod encode;
mod queue;
mod upload;

pub(crate) use collect::{Collector, run as collect};
pub(crate) use encode::{Losses, Quality, encode};
pub(crate) use queue::{Batch, Queue};
pub(crate) use upload::{Destination, UploadCounts, is_loopback, run as upload};
