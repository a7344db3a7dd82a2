//! A closed window as uploads: one pprof per series, some series per request.

use std::{borrow::Cow, collections::HashMap, io};

use chrono::{DateTime, SecondsFormat};
use profiler_common::wire::StackEnd;
use profiler_pprof::{
    FrameKind, FunctionSpec, Gzip, LabelSpec, LineSpec, LocationId, LocationSpec, MappingId, MappingSpec,
    ProfileBuilder, TypeSpec,
    push::{self, PushRequest, Temporality},
};

use super::queue::Batch;
use crate::{
    drain::KernelCut,
    executable::Executable,
    faults,
    languages::{self, Language},
    ledger::{PerType, ProfileType},
    normalize::Location,
    symbolize::{self, KERNEL, LocationKey},
    vdso,
    window::{Closed, Measure, OBJECT, SampleLabels, Series},
};

/// Bytes of pprof in one request: a request is retried as a whole, and other backends take 2 MiB at most.
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Series in one request.
const REQUEST_SERIES_MAX: usize = 256;
/// Level 3 of zstd: pprof shrinks to a third at 300 MB/s; the next levels gain 3 % for twice the time.
const ZSTD_LEVEL: i32 = 3;

/// As perf names the kernel itself; its modules are `[name]`, BPF programs `[bpf]`.
const KERNEL_MAPPING: &str = "[kernel.kallsyms]";
/// A kernel frame without a name. Its address stays here: it would tell where the kernel lies.
const KERNEL_UNNAMED: &str = "[kernel]";
/// As perf names memory of generated code. Its addresses mean nothing in another process.
const GENERATED_MAPPING: &str = "//anon";

/// Samples lost on this node since the window before was encoded, by cause: said in every profile of a window.
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
    let mut gzip = Gzip::new();
    for series in &window.series {
        let pprof = gzip.encode(&SeriesEncoder::new(window, symbols, losses).encode(series));
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
            Location::Marker(_) | Location::KernelMarker(_) => {}
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
    events: PerType<u64>,
}

impl Request {
    fn is_full(&self, more_bytes: usize) -> bool {
        let full = self.bytes + more_bytes > REQUEST_BYTES_MAX || self.series.len() >= REQUEST_SERIES_MAX;
        full && !self.series.is_empty()
    }

    fn push(&mut self, window: &Closed, series: &Series, pprof: Vec<u8>) {
        self.bytes += pprof.len();
        // A snapshot's samples have been accounted for where they were taken.
        if !matches!(window.measure, Measure::InUse { .. }) {
            *self.events.of_mut(window.measure.profile_type()) +=
                series.samples.iter().map(|entry| entry.counts.samples).sum::<u64>();
        }
        let (profile_type, temporality) = match window.measure {
            Measure::Cpu => (ProfileType::Cpu.name(), Temporality::Delta),
            Measure::Allocs { .. } => (ProfileType::Allocs.name(), Temporality::Delta),
            Measure::InUse { .. } => ("heap", Temporality::Snapshot),
            Measure::PageFaults => (ProfileType::PageFaults.name(), Temporality::Delta),
        };
        self.series.push(push::Series {
            labels: push::labels(series.labels.iter()),
            profile_type: profile_type.to_owned(),
            temporality: temporality.to_wire(),
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
        Ok(Batch { body: body.into(), events: self.events })
    }
}

/// Builds the profile of one series.
struct SeriesEncoder<'a> {
    window: &'a Closed,
    symbols: &'a HashMap<symbolize::LocationId, symbolize::Location>,
    builder: ProfileBuilder,
    /// The builder's id of each location of the window that this series has used.
    locations: HashMap<u32, LocationId>,
    interpreted: Interpreted,
}

/// What a series has of code that its runtime interprets or generates.
#[derive(Clone, Debug, Default)]
struct Interpreted {
    /// The languages, each once.
    languages: Vec<&'static Language>,
    /// Generated code has names. In Python's process that is a trampoline of CPython, named as what it leads to.
    is_named: bool,
}

impl Interpreted {
    fn meet(&mut self, language: Option<&'static Language>) {
        self.languages.extend(language.filter(|language| !self.languages.contains(language)));
    }

    fn hints(&self) -> impl Iterator<Item = String> {
        self.languages.iter().filter(|_| !self.is_named).map(|language| language.hint())
    }
}

impl<'a> SeriesEncoder<'a> {
    fn new(
        window: &'a Closed,
        symbols: &'a HashMap<symbolize::LocationId, symbolize::Location>,
        losses: &Losses,
    ) -> Self {
        let mut builder = match window.measure {
            Measure::Cpu => cpu_builder(window.period_ns),
            Measure::Allocs { rate } => heap_builder(["alloc_objects", "alloc_space"], rate),
            Measure::InUse { rate } => heap_builder(["inuse_objects", "inuse_space"], rate),
            Measure::PageFaults => faults_builder(),
        };
        builder.time_ns(window.start_unix_ns.cast_signed());
        builder.duration_ns(window.duration_ns.cast_signed());
        if let Some(comment) = loss_comment(window, losses) {
            builder.comment(&comment);
        }
        Self { window, symbols, builder, locations: HashMap::new(), interpreted: Interpreted::default() }
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
            let count = match window.measure {
                Measure::Cpu => counts.samples,
                Measure::Allocs { .. } | Measure::InUse { .. } | Measure::PageFaults => {
                    counts.objects.saturating_add(OBJECT / 2) / OBJECT
                }
            };
            let values = [count, counts.value].map(|value| i64::try_from(value).unwrap_or(i64::MAX));
            self.builder.sample(&stack, &values, labels.as_slice());
        }
        for text in &series.comments {
            self.builder.comment(text);
        }
        for hint in self.interpreted.hints() {
            self.builder.comment(&hint);
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
            Location::KernelMarker(cut) => self.named(None, 0, FrameKind::Marker, kernel_marker(*cut)),
        };
        self.locations.insert(index, id);
        id
    }

    fn code(&mut self, key: &LocationKey) -> LocationId {
        let symbols = self.symbols;
        match (key, symbols.get(&key.id())) {
            (LocationKey::Native { executable, addr }, Some(symbolize::Location::Resolved(frames))) => {
                let mapping = self.executable(executable);
                let languages = frames.iter().map(|frame| languages::of_loop(&frame.function));
                languages.for_each(|language| self.interpreted.meet(language));
                let lines: Vec<_> = frames.iter().map(native_line).collect();
                self.lines(mapping, addr.0, native_kind(executable), &lines)
            }
            (LocationKey::Native { executable, addr }, _) => {
                let mapping = self.executable(executable);
                let name = format!("{}+{:#x}", executable.name(), addr.0);
                self.named(Some(mapping), addr.0, native_kind(executable), &name)
            }
            (LocationKey::Generated { code, .. }, found) => {
                let mapping = self.whole(GENERATED_MAPPING);
                match found {
                    Some(symbolize::Location::Resolved(frames)) => {
                        self.interpreted.is_named = true;
                        let lines: Vec<_> = frames.iter().map(native_line).collect();
                        self.lines(mapping, 0, FrameKind::Jit, &lines)
                    }
                    _ => {
                        self.interpreted.meet(code.language());
                        self.named(Some(mapping), 0, FrameKind::Jit, code.unnamed())
                    }
                }
            }
            (LocationKey::Kernel(_), Some(symbolize::Location::Resolved(frames))) => {
                let innermost = frames.first();
                let mapping = self.kernel(innermost.map_or(KERNEL, |frame| &frame.module));
                let lines: Vec<_> = frames.iter().map(native_line).collect();
                let address = innermost.map_or(0, |frame| frame.module_offset);
                self.lines(mapping, address, FrameKind::Kernel, &lines)
            }
            (LocationKey::Kernel(_), _) => {
                let mapping = self.kernel(KERNEL);
                self.named(Some(mapping), 0, FrameKind::Kernel, KERNEL_UNNAMED)
            }
        }
    }

    /// A mapping whose place in the process is not said: it differs from one to the next.
    fn whole(&mut self, name: &str) -> MappingId {
        self.mapping(name, 0, u64::MAX, 0, "")
    }

    /// Code that no executable backs.
    fn unnamed(&mut self, mapping: &str, addr: u64) -> LocationId {
        match mapping {
            "" => self.named(None, 0, FrameKind::Native, "[unknown]"),
            file => {
                let mapping = self.whole(file);
                let function = (file == vdso::NAME).then(|| vdso::function_at(addr)).flatten();
                let unnamed = || Cow::Owned(format!("{file}+{addr:#x}"));
                let name = function.map_or_else(unnamed, Cow::Borrowed);
                self.named(Some(mapping), addr, FrameKind::Native, &name)
            }
        }
    }

    fn executable(&mut self, executable: &Executable) -> MappingId {
        let path = executable.path().to_string_lossy();
        let build_id = executable.build_id().map(ToString::to_string).unwrap_or_default();
        match executable.code_range() {
            Some((range, offset)) => self.mapping(&path, range.start.0, range.end.0, offset.0, &build_id),
            None => self.mapping(&path, 0, 0, 0, &build_id),
        }
    }

    /// Addresses in it are offsets.
    fn kernel(&mut self, module: &str) -> MappingId {
        match module {
            KERNEL => self.mapping(KERNEL_MAPPING, 0, u64::MAX, 0, ""),
            module => self.mapping(&format!("[{module}]"), 0, u64::MAX, 0, ""),
        }
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

fn cpu_builder(period_ns: u64) -> ProfileBuilder {
    let cpu = TypeSpec::new("cpu", "nanoseconds");
    let samples = TypeSpec::new("samples", "count");
    let mut builder = ProfileBuilder::new(&[samples, cpu], cpu, period_ns.cast_signed());
    builder.default_sample_type("cpu");
    builder.comment(&format!("sampled every {period_ns} ns of CPU time"));
    builder
}

/// What stands between a C++ program and the allocator: pprof drops these frames, so that memory is their callers'.
/// profile.proto: Profile.drop_frames.
const ALLOCATOR_FRAMES: &str = r"operator new(\[\])?|(std|__gnu_cxx)::(__)?(new_)?(allocator|allocator_traits)<.*|std::__detail::_Hashtable_alloc<.*";

/// `types` are those of objects and of bytes, named as in Go's profiles.
fn heap_builder(types: [&'static str; 2], rate: u32) -> ProfileBuilder {
    let [objects, space] = types;
    let types = [TypeSpec::new(objects, "count"), TypeSpec::new(space, "bytes")];
    let mut builder = ProfileBuilder::new(&types, TypeSpec::new("space", "bytes"), rate.into());
    builder.default_sample_type(space);
    builder.frame_filters(ALLOCATOR_FRAMES, "");
    builder.comment(&format!(
        "one sample per {rate} bytes allocated, each scaled by the inverse of its probability"
    ));
    builder
}

fn faults_builder() -> ProfileBuilder {
    let (faults, space) = (TypeSpec::new("faults", "count"), TypeSpec::new("fault_space", "bytes"));
    let mut builder = ProfileBuilder::new(&[faults, space], faults, faults::PERIOD.cast_signed());
    builder.default_sample_type("fault_space");
    builder.comment(&format!(
        "one in {} page faults, without those of files and of shared memory",
        faults::PERIOD
    ));
    builder
}

/// `lost on this node in the window from .. to ..: 3 samples (ring_full), ..`; `None` when nothing was lost.
///
/// The window's time makes it one comment of all the window's profiles, and another than the next window's.
fn loss_comment(window: &Closed, losses: &Losses) -> Option<String> {
    let start_ns = window.start_unix_ns.cast_signed();
    let time = |ns| DateTime::from_timestamp_nanos(ns).to_rfc3339_opts(SecondsFormat::Millis, true);
    let end_ns = start_ns.saturating_add_unsigned(window.duration_ns);
    let losses: Vec<_> = losses.iter().map(|(cause, events)| format!("{events} samples ({cause})")).collect();
    (!losses.is_empty()).then(|| {
        format!(
            "lost on this node in the window from {} to {}: {}",
            time(start_ns),
            time(end_ns),
            losses.join(", ")
        )
    })
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
fn kernel_marker(cut: KernelCut) -> &'static str {
    match cut {
        KernelCut::DepthLimit => "[truncated: kernel stack too deep]",
        KernelCut::Refused => "[truncated: no kernel stack]",
    }
}

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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use profiler_pprof::{check, proto::Profile};

    use super::*;
    use crate::{
        addr::{Addr, ElfAddr},
        label::{Labeler, Subject},
        process::GeneratedCode,
        symbolize::{Frame, Reason},
        window::{Counts, Entry, Room, Taken},
    };

    /// A window of one stack, which is all of `locations`.
    fn window(locations: Vec<Location>) -> Closed {
        let stack = (0..u32::try_from(locations.len()).expect("few")).collect();
        let labels = Labeler::new("n", &[]).series(&Subject { exe: "/x", ..Subject::default() });
        let samples =
            vec![Entry { stack: 0, labels: 0, counts: Counts { samples: 1, value: 10, objects: 0 } }];
        Closed {
            start_unix_ns: 1_795_255_200_000_000_000,
            duration_ns: 10_000_000_000,
            period_ns: 10,
            measure: Measure::Cpu,
            samples: 1,
            series: vec![Series { labels, samples, comments: Vec::new() }],
            locations,
            stacks: vec![stack],
            labels: vec![SampleLabels { comm: "x".into(), thread_name: "x".into(), pid: 1 }],
            taken: Taken::nothing(&Room::new(0)),
        }
    }

    fn profile(
        window: &Closed,
        symbols: &HashMap<symbolize::LocationId, symbolize::Location>,
        losses: &Losses,
    ) -> Profile {
        let profile = SeriesEncoder::new(window, symbols, losses).encode(&window.series[0]);
        check(&profile).expect("a valid profile");
        profile
    }

    /// Mapping, address and name of each location.
    fn shown(profile: &Profile) -> Vec<(&str, u64, &str, FrameKind)> {
        let text = |index: i64| profile.string(index).expect("a string");
        let locations = profile.location.iter().map(|location| {
            let mapping = profile.mapping(location.mapping_id).map_or("", |mapping| text(mapping.filename));
            let function = profile.function(location.line[0].function_id).expect("a function");
            let kind = FrameKind::from_wire(location.kind).expect("a kind");
            (mapping, location.address, text(function.name), kind)
        });
        locations.collect()
    }

    fn kernel(addr: u64) -> Location {
        Location::Code(LocationKey::Kernel(Addr(addr)))
    }

    fn found(module: &str, function: &str, module_offset: u64) -> symbolize::Location {
        let frame = Frame {
            function: function.into(),
            system_name: function.into(),
            module: module.into(),
            file: "".into(),
            line: 0,
            start_line: 0,
            module_offset,
        };
        symbolize::Location::Resolved(Arc::new([frame]))
    }

    #[test]
    fn kernel_frames_are_told_by_module_and_never_by_their_address() {
        const BASE: u64 = 0xffff_ffff_8100_0000;
        let answers = [
            found("kernel", "vfs_read", 0x1234),
            found("nf_tables", "nft_do_chain", 0x50),
            found("bpf", "bpf_prog_1", 0x10),
            symbolize::Location::Unresolved(Reason::NotInSymbols),
            symbolize::Location::Unresolved(Reason::KallsymsHidden),
        ];
        let window = window((0..6).map(|index| kernel(BASE + index)).collect());
        let symbols = (0..)
            .zip(answers)
            .map(|(index, answer)| (symbolize::LocationId::Kernel(Addr(BASE + index)), answer));
        let profile = profile(&window, &symbols.collect(), &Losses::new());
        let expect = [
            ("[kernel.kallsyms]", 0x1234, "vfs_read"),
            ("[nf_tables]", 0x50, "nft_do_chain"),
            ("[bpf]", 0x10, "bpf_prog_1"),
            ("[kernel.kallsyms]", 0, "[kernel]"),
        ];
        assert_eq!(shown(&profile), expect.map(|(mapping, at, name)| (mapping, at, name, FrameKind::Kernel)));
        assert!(profile.mapping.iter().all(|mapping| mapping.memory_start == 0), "{:?}", profile.mapping);
    }

    #[test]
    fn frames_without_an_executable_do_not_say_where_the_process_has_them() {
        let generated = |exe: &str, addr| {
            let code = Arc::new(GeneratedCode::new(1, 0, exe));
            Location::Code(LocationKey::Generated { version: code.version(), code, addr: Addr(addr) })
        };
        let named = generated("node", 0x7f45_679a_4b48);
        let Location::Code(key) = &named else { unreachable!("it is code") };
        let symbols = HashMap::from([(key.id(), found("", "hot", 0))]);
        let find = |offset: u64| Some((offset, vdso::function_at(offset)?));
        let clock = (0..u64::from(u16::MAX)).find_map(find).expect("a vDSO has functions");
        let window = window(vec![
            generated("node", 0x7f45_679a_4b46),
            generated("node", 0x7f45_679a_4b47),
            generated("luajit", 0x7f45_679a_4b46),
            generated("something", 0x7f45_679a_4b46),
            named,
            Location::unnamed("", Addr(0x7f45_0000_0000)),
            Location::unnamed("[vdso]", Addr(1)),
            Location::unnamed("[vdso]", Addr(clock.0)),
        ]);
        let profile = profile(&window, &symbols, &Losses::new());
        let expect = [
            ("//anon", 0, "[jit: names with node --perf-basic-prof]", FrameKind::Jit),
            ("//anon", 0, "[jit: names with a LuaJIT built with LUAJIT_USE_PERFTOOLS]", FrameKind::Jit),
            ("//anon", 0, "[jit]", FrameKind::Jit),
            ("//anon", 0, "hot", FrameKind::Jit),
            ("", 0, "[unknown]", FrameKind::Native),
            ("[vdso]", 1, "[vdso]+0x1", FrameKind::Native),
            ("[vdso]", clock.0, clock.1, FrameKind::Native),
        ];
        assert_eq!(shown(&profile), expect);
        assert_eq!(profile.sample[0].location_id.len(), 8, "every frame stays");
    }

    #[test]
    fn interpreted_code_without_names_says_once_which_switch_gives_them() {
        let executable = crate::executable::testing::read("/proc/self/exe".as_ref()).expect("this program");
        let native = |addr| {
            let executable = Arc::clone(&executable);
            Location::Code(LocationKey::Native { executable, addr: ElfAddr(addr) })
        };
        let generated = |exe: &str, addr| {
            let code = Arc::new(GeneratedCode::new(1, 0, exe));
            Location::Code(LocationKey::Generated { version: code.version(), code, addr: Addr(addr) })
        };
        let comments = |locations: &[(&Location, &str)]| {
            let named = locations.iter().filter(|(_, name)| !name.is_empty());
            let symbols = named.map(|(location, name)| {
                let Location::Code(key) = location else { unreachable!("it is code") };
                (key.id(), found("", name, 0))
            });
            let window = window(locations.iter().map(|&(location, _)| location.clone()).collect());
            let profile = profile(&window, &symbols.collect(), &Losses::new());
            let comments =
                profile.comment.iter().map(|&index| profile.string(index).expect("text").to_owned());
            comments.filter(|comment| comment.starts_with("frames of ")).collect::<Vec<_>>()
        };
        let hints = |names: &[&str]| -> Vec<String> {
            names.iter().map(|name| languages::of_executable(name).expect("a language").hint()).collect()
        };
        let (eval, again, main) = (&native(1), &native(2), &native(3));
        const PYTHON: &str = "_PyEval_EvalFrameDefault";
        assert_eq!(comments(&[(eval, PYTHON), (again, PYTHON), (main, "main")]), hints(&["python"]));
        assert_eq!(comments(&[(eval, PYTHON), (&generated("python3.12", 1), "work")]), hints(&[]));
        assert_eq!(comments(&[(main, "main")]), hints(&[]));
        assert_eq!(comments(&[(eval, "execute_ex"), (again, "rb_vm_exec")]), hints(&["php", "ruby"]));
        for exe in ["node", "java", "dotnet", "beam.smp", "ruby", "php", "luajit"] {
            assert_eq!(
                comments(&[(&generated(exe, 1), ""), (&generated(exe, 2), "")]),
                hints(&[exe]),
                "{exe}"
            );
            assert_eq!(
                comments(&[(&generated(exe, 1), ""), (&generated(exe, 2), "hot")]),
                hints(&[]),
                "{exe}"
            );
        }
        assert_eq!(comments(&[(&generated("unknown", 1), "")]), hints(&[]));
    }

    #[test]
    fn losses_are_one_comment_with_the_time_of_the_window() {
        let comments = |losses: &Losses| {
            let profile = profile(&window(Vec::new()), &HashMap::new(), losses);
            profile
                .comment
                .iter()
                .map(|&index| profile.string(index).expect("text").to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(comments(&Losses::new()), ["sampled every 10 ns of CPU time"]);
        assert_eq!(
            comments(&vec![("ring_full", 3), ("window_full", 4)]),
            [
                "sampled every 10 ns of CPU time",
                "lost on this node in the window from 2026-11-21T10:00:00.000Z to 2026-11-21T10:00:10.000Z: \
                 3 samples (ring_full), 4 samples (window_full)",
            ]
        );
    }
}
