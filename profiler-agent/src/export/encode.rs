//! A closed window as uploads: one pprof per series, some series per request.

use std::{collections::HashMap, io};

use profiler_common::wire::StackEnd;
use profiler_pprof::{
    FrameKind, FunctionSpec, LabelSpec, LineSpec, LocationId, LocationSpec, MappingId, MappingSpec,
    ProfileBuilder, TypeSpec, encode_gzip,
    push::{self, PushRequest, Temporality},
};

use super::queue::Batch;
use crate::{
    executable::Executable,
    normalize::Location,
    symbolize::{self, LocationKey, Reason},
    window::{Closed, SampleLabels, Series},
};

/// Bytes of pprof in one request: a request is retried as a whole, and other backends take 2 MiB at most.
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Series in one request.
const REQUEST_SERIES_MAX: usize = 256;
/// Level 3 of zstd: pprof shrinks to a third at 300 MB/s; the next levels gain 3 % for twice the time.
const ZSTD_LEVEL: i32 = 3;

const KERNEL_MAPPING: &str = "[kernel.kallsyms]";
/// What pprof files call memory of generated code.
const ANONYMOUS_MAPPING: &str = "//anon";

/// Samples lost on this node while the window was open, by cause: said in every profile of it.
pub(crate) type Losses = Vec<(&'static str, u64)>;

/// How many frames of a window have names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Quality {
    /// Different locations with a name.
    pub(crate) named: u64,
    /// Different locations without.
    pub(crate) unnamed: u64,
}

/// A window, encoded.
#[derive(Debug)]
pub(crate) struct Encoded {
    /// The requests to send.
    pub(crate) batches: Vec<Batch>,
    /// Of the window's locations.
    pub(crate) quality: Quality,
}

/// Encodes a window. `symbols` has an answer for every location of it that is code.
pub(crate) fn encode(
    window: &Closed,
    symbols: &HashMap<symbolize::LocationId, symbolize::Location>,
    losses: &Losses,
) -> io::Result<Encoded> {
    let mut batches = Vec::new();
    let mut request = Request::default();
    for series in &window.series {
        let pprof = encode_gzip(&SeriesEncoder::new(window, symbols, losses).encode(series));
        if request.is_full(pprof.len()) {
            batches.push(std::mem::take(&mut request).into_batch()?);
        }
        request.push(window, series, pprof);
    }
    if !request.series.is_empty() {
        batches.push(request.into_batch()?);
    }
    Ok(Encoded { batches, quality: quality(window, symbols) })
}

fn quality(window: &Closed, symbols: &HashMap<symbolize::LocationId, symbolize::Location>) -> Quality {
    let mut quality = Quality::default();
    for location in &window.locations {
        match location {
            Location::Marker(_) => {}
            Location::Code(key)
                if matches!(symbols.get(&key.id()), Some(symbolize::Location::Resolved(_))) =>
            {
                quality.named += 1;
            }
            Location::Code(_) | Location::Unnamed { .. } => quality.unnamed += 1,
        }
    }
    quality
}

/// A request under construction.
#[derive(Default)]
struct Request {
    series: Vec<push::Series>,
    bytes: usize,
    events: u64,
}

impl Request {
    fn is_full(&self, more_bytes: usize) -> bool {
        let full = self.bytes + more_bytes > REQUEST_BYTES_MAX || self.series.len() >= REQUEST_SERIES_MAX;
        full && !self.series.is_empty()
    }

    fn push(&mut self, window: &Closed, series: &Series, pprof: Vec<u8>) {
        self.bytes += pprof.len();
        self.events += series.samples.iter().map(|entry| entry.counts.samples).sum::<u64>();
        self.series.push(push::Series {
            labels: push::labels(series.labels.iter()),
            profile_type: "cpu".to_owned(),
            temporality: Temporality::Delta.to_wire(),
            start_unix_ns: window.start_unix_ns.cast_signed(),
            duration_ns: window.duration_ns,
            pprof,
        });
    }

    fn into_batch(self) -> io::Result<Batch> {
        let request = PushRequest {
            format_version: push::FORMAT_VERSION,
            batch_id: crate::sys::random::bytes::<{ push::BATCH_ID_BYTES }>()?.to_vec(),
            agent: concat!("profiler-agent/", env!("CARGO_PKG_VERSION")).to_owned(),
            series: self.series,
        };
        let body = zstd::bulk::compress(&request.to_bytes(), ZSTD_LEVEL)?;
        Ok(Batch { body, events: self.events })
    }
}

/// Builds the profile of one series.
struct SeriesEncoder<'a> {
    window: &'a Closed,
    symbols: &'a HashMap<symbolize::LocationId, symbolize::Location>,
    builder: ProfileBuilder,
    /// The builder's id of each location of the window that this series has used.
    locations: HashMap<u32, LocationId>,
}

impl<'a> SeriesEncoder<'a> {
    fn new(
        window: &'a Closed,
        symbols: &'a HashMap<symbolize::LocationId, symbolize::Location>,
        losses: &Losses,
    ) -> Self {
        let cpu = TypeSpec::new("cpu", "nanoseconds");
        let samples = TypeSpec::new("samples", "count");
        let mut builder = ProfileBuilder::new(&[samples, cpu], cpu, window.period_ns.cast_signed());
        builder.default_sample_type("cpu");
        builder.time_ns(window.start_unix_ns.cast_signed());
        builder.duration_ns(window.duration_ns.cast_signed());
        builder.comment(&format!("sampled every {} ns of CPU time", window.period_ns));
        for (cause, events) in losses {
            builder.comment(&format!("lost on this node: {events} samples ({cause})"));
        }
        Self { window, symbols, builder, locations: HashMap::new() }
    }

    fn encode(mut self, series: &Series) -> profiler_pprof::proto::Profile {
        let window = self.window;
        for entry in &series.samples {
            let stack: Vec<_> =
                window.stacks[entry.stack as usize].iter().map(|&index| self.location(index)).collect();
            let SampleLabels { comm, thread_name, pid } = &window.labels[entry.labels as usize];
            let labels = [
                LabelSpec::text("comm", comm),
                LabelSpec::text("thread_name", thread_name),
                LabelSpec::number("pid", i64::from(*pid)),
            ];
            let counts = entry.counts;
            let values = [counts.samples, counts.value].map(|value| i64::try_from(value).unwrap_or(i64::MAX));
            self.builder.sample(&stack, &values, labels.as_slice());
        }
        self.builder.finish()
    }

    fn location(&mut self, index: u32) -> LocationId {
        if let Some(&known) = self.locations.get(&index) {
            return known;
        }
        let window = self.window;
        let id = match &window.locations[index as usize] {
            Location::Code(key) => self.code(key),
            Location::Unnamed { mapping, addr } => self.unnamed(mapping, addr.0),
            Location::Marker(end) => self.named(None, 0, FrameKind::Marker, marker(*end)),
        };
        self.locations.insert(index, id);
        id
    }

    fn code(&mut self, key: &LocationKey) -> LocationId {
        let symbols = self.symbols;
        match (key, symbols.get(&key.id())) {
            (LocationKey::Native { executable, addr }, Some(symbolize::Location::Resolved(frames))) => {
                let mapping = self.executable(executable);
                let lines: Vec<_> = frames.iter().map(native_line).collect();
                self.lines(mapping, addr.0, native_kind(executable), &lines)
            }
            (LocationKey::Native { executable, addr }, _) => {
                let mapping = self.executable(executable);
                let name = format!("{}+{:#x}", executable.name(), addr.0);
                self.named(Some(mapping), addr.0, native_kind(executable), &name)
            }
            (LocationKey::Kernel(addr), Some(symbolize::Location::Resolved(frames))) => {
                let mapping = self.kernel();
                let lines: Vec<_> = frames.iter().map(native_line).collect();
                self.lines(mapping, addr.0, FrameKind::Kernel, &lines)
            }
            (LocationKey::Kernel(addr), found) => {
                let mapping = self.kernel();
                let hidden = matches!(found, Some(symbolize::Location::Unresolved(Reason::KallsymsHidden)));
                let name = if hidden { "[kernel]".to_owned() } else { format!("kernel+{:#x}", addr.0) };
                self.named(Some(mapping), addr.0, FrameKind::Kernel, &name)
            }
        }
    }

    /// Code that no executable backs: generated, in the vDSO, or nowhere.
    fn unnamed(&mut self, mapping: &str, addr: u64) -> LocationId {
        let (kind, name) = match mapping {
            "" => (FrameKind::Native, format!("[unknown]+{addr:#x}")),
            ANONYMOUS_MAPPING => (FrameKind::Jit, format!("[jit]+{addr:#x}")),
            name => (FrameKind::Native, format!("{name}+{addr:#x}")),
        };
        let mapping = (!mapping.is_empty()).then(|| self.mapping(mapping, 0, u64::MAX, 0, ""));
        self.named(mapping, addr, kind, &name)
    }

    fn executable(&mut self, executable: &Executable) -> MappingId {
        let path = executable.path().to_string_lossy();
        let build_id = executable.build_id().map(ToString::to_string).unwrap_or_default();
        match executable.code_range() {
            Some((range, offset)) => self.mapping(&path, range.start.0, range.end.0, offset.0, &build_id),
            None => self.mapping(&path, 0, 0, 0, &build_id),
        }
    }

    fn kernel(&mut self) -> MappingId {
        self.mapping(KERNEL_MAPPING, 1 << 63, u64::MAX, 0, "")
    }

    fn mapping(&mut self, filename: &str, start: u64, limit: u64, offset: u64, build_id: &str) -> MappingId {
        self.builder.mapping(&MappingSpec { start, limit, offset, filename, build_id })
    }

    /// A location with one function that has no source.
    fn named(&mut self, mapping: Option<MappingId>, address: u64, kind: FrameKind, name: &str) -> LocationId {
        let function = FunctionSpec { name, system_name: name, filename: "", start_line: 0 };
        self.location_of(mapping, address, kind, &[LineSpec { function, line: 0, column: 0 }])
    }

    fn lines(
        &mut self,
        mapping: MappingId,
        address: u64,
        kind: FrameKind,
        lines: &[LineSpec<'_>],
    ) -> LocationId {
        self.location_of(Some(mapping), address, kind, lines)
    }

    fn location_of(
        &mut self,
        mapping: Option<MappingId>,
        address: u64,
        kind: FrameKind,
        lines: &[LineSpec<'_>],
    ) -> LocationId {
        self.builder.location(&LocationSpec { mapping, address, kind, is_folded: false, lines })
    }
}

fn native_kind(executable: &Executable) -> FrameKind {
    if executable.is_go() { FrameKind::Go } else { FrameKind::Native }
}

fn native_line(frame: &symbolize::Frame) -> LineSpec<'_> {
    LineSpec {
        function: FunctionSpec {
            name: &frame.function,
            system_name: &frame.system_name,
            filename: &frame.file,
            start_line: i64::from(frame.start_line),
        },
        line: i64::from(frame.line),
        column: 0,
    }
}

/// The frame at the root end that says why there is no further one.
fn marker(end: StackEnd) -> &'static str {
    match end {
        StackEnd::Root | StackEnd::NoUserStack | StackEnd::FramePointerZero => "[complete]",
        StackEnd::ReadFailed => "[truncated: stack memory not readable]",
        StackEnd::NotRising => "[truncated: no frame pointers]",
        StackEnd::NoMapping => "[truncated: address in no known mapping]",
        StackEnd::NoUnwindInformation => "[truncated: no unwind information]",
        StackEnd::InvalidRule => "[truncated: unwind information not usable]",
        StackEnd::RegisterLost => "[truncated: unwind information needs a lost register]",
        StackEnd::DepthLimit => "[truncated: too deep]",
        StackEnd::NoRegisters => "[truncated: user registers not found]",
    }
}
