//! Flags, environment and file, in this order, make one validated [`Config`]. Nothing below parses.

mod show;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{ArgMatches, Args, parser::ValueSource};
use profiler_backend::Token;
use profiler_common::limits::{FREQUENCY_HZ_MAX, FREQUENCY_HZ_MIN, USER_FRAMES_LIMIT_MIN, USER_FRAMES_MAX};
use profiler_pprof::push;
use reqwest::Url;
use serde::Deserialize;

use crate::{
    budget::{self, CpuShare},
    export::Destination,
    heap,
    ledger::ProfileType,
    logs,
    memory::{self, MemoryPlan, TooSmall},
    pipeline,
    sys::bpf::UprobeKind,
    targets::{CommPrefix, Target, Targets},
};
pub(crate) use show::Key;

const DEFAULT_FREQUENCY_HZ: u32 = 19;
const DEFAULT_WINDOW: Duration = Duration::from_secs(10);
const WINDOW_MIN: Duration = Duration::from_secs(1);
const WINDOW_MAX: Duration = Duration::from_secs(600);
const DEFAULT_LISTEN: &str = "127.0.0.1:7701";
const DEFAULT_BACKEND_LISTEN: &str = "127.0.0.1:7700";
const DEFAULT_DATA_DIR: &str = "/var/lib/profiler";
const DEFAULT_RUN_DIR: &str = "/run/profiler";
/// Characters of an instance's name: it becomes part of a file's name.
const INSTANCE_CHARS_MAX: usize = 32;
/// Kinds of profiles there are. Heaps are profiled where `heap` says so.
const PROFILE_KINDS: [&str; 2] = ["cpu", "page_faults"];
/// Bytes of a configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What may be given as a flag. The environment stands for flags that are not given.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Flags {
    /// Configuration file (TOML). Keys are the long flags with underscores (`labels` is a table); see --print-config.
    /// Flags win over the environment, which wins over the file
    #[arg(long, env = "PROFILER_CONFIG", value_name = "FILE", global = true)]
    config: Option<PathBuf>,

    /// Print every key with its value and where that comes from, without secrets, and exit
    #[arg(long)]
    print_config: bool,

    /// Samples per second and CPU, 1 to 1000 [default: 19]
    #[arg(short = 'F', long, env = "PROFILER_FREQUENCY", value_name = "HZ")]
    frequency: Option<String>,

    /// What profiling may take of the CPU time of all CPUs, as 1% or 0.5%, or off. Above it the sampling frequency is halved
    /// until it fits [default: 1%]
    #[arg(long, env = "PROFILER_CPU_BUDGET", value_name = "SHARE")]
    cpu_budget: Option<String>,

    /// For tests alone: seconds that a frequency is kept before its use is judged
    #[arg(long, hide = true, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    test_budget_term: Option<u64>,

    /// What the agent may take of the machine's memory, its maps in the kernel included, as 128MiB or 1GiB [default: 90% of
    /// the limit of the agent's own cgroup, else 256MiB]
    #[arg(long, env = "PROFILER_MEMORY_LIMIT", value_name = "BYTES")]
    memory_limit: Option<String>,

    /// Length of a window: what one uploaded profile covers, 1s to 10m [default: 10s]
    #[arg(long, env = "PROFILER_WINDOW", value_name = "DURATION")]
    window: Option<String>,

    /// Address of the agent's own HTTP: /metrics, /healthz, /readyz, /status [default: 127.0.0.1:7701]
    #[arg(long, env = "PROFILER_LISTEN", value_name = "ADDRESS:PORT")]
    listen: Option<String>,

    /// Address of the embedded backend and its UI [default: 127.0.0.1:7700]
    #[arg(long, env = "PROFILER_BACKEND_LISTEN", value_name = "ADDRESS:PORT")]
    backend_listen: Option<String>,

    /// Where the embedded backend keeps profiles [default: /var/lib/profiler]
    #[arg(long, env = "PROFILER_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,

    /// Where the names of symbolized code are kept for the next start, at most 64 MiB [default: DATA_DIR/cache]
    #[arg(long, env = "PROFILER_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,

    /// debuginfod server to ask for debug information by build id; may be given more than once. None is asked by default, nor is
    /// DEBUGINFOD_URLS of the environment
    #[arg(
        long = "debuginfod-url",
        env = "PROFILER_DEBUGINFOD_URLS",
        value_name = "URL",
        value_delimiter = ','
    )]
    debuginfod_urls: Vec<String>,

    /// How to find the callers of native code: dwarf (unwind tables made from each executable's .eh_frame; frame
    /// pointers where there are none) or frame-pointers [default: dwarf]
    #[arg(long, env = "PROFILER_UNWIND", value_name = "HOW")]
    unwind: Option<String>,

    /// User frames of a stack, 127 to 1024; what is cut is marked [default: 1024]
    #[arg(long, env = "PROFILER_STACK_DEPTH", value_name = "FRAMES")]
    stack_depth: Option<String>,

    /// Sample this process only; may be given more than once. Each of --pid, --comm and --cgroup adds to what is sampled, ahead
    /// of the file's targets
    #[arg(short = 'p', long, env = "PROFILER_PID", value_name = "PID", value_delimiter = ',')]
    pid: Vec<String>,

    /// Sample processes whose name begins so only; may be given more than once
    #[arg(long, env = "PROFILER_COMM", value_name = "NAME", value_delimiter = ',')]
    comm: Vec<String>,

    /// Sample this cgroup (v2), as /proc/PID/cgroup writes it, and those below it only; may be given more than once
    #[arg(long, env = "PROFILER_CGROUP", value_name = "PATH", value_delimiter = ',')]
    cgroup: Vec<PathBuf>,

    /// Send profiles to a remote backend instead; may be given more than once. KIND is `profiler`
    #[arg(
        long,
        env = "PROFILER_UPLOAD",
        hide_env_values = true,
        value_name = "[KIND+]URL",
        value_delimiter = ','
    )]
    upload: Vec<String>,

    /// File with the bearer token that the one --upload wants; several have `token_file` each in the file
    #[arg(long, env = "PROFILER_UPLOAD_TOKEN_FILE", value_name = "FILE")]
    upload_token_file: Option<PathBuf>,

    /// Name of this node: the label `node` [default: the host name]
    #[arg(long, env = "PROFILER_NODE", value_name = "NAME")]
    node: Option<String>,

    /// Label for every profile of this agent; may be given more than once
    #[arg(long, env = "PROFILER_LABEL", value_name = "NAME=VALUE", value_delimiter = ',')]
    label: Vec<String>,

    /// Profile the heap of processes with a label: NAME=VALUE, with @RATE, @BUDGET or both behind it, as exe=postgres@64KiB@5%. NAME is a label of their
    /// profiles, pid, family (a pid with what it starts) or cgroup (v2, with those below), RATE the mean bytes between samples, 1
    /// for everything, 0 for none [default: 512KiB], BUDGET as --heap-budget; may be given more than once, the first that
    /// matches counts. x86-64, Linux 5.15
    #[arg(long, env = "PROFILER_HEAP", value_name = "MATCH", value_delimiter = ',')]
    heap: Vec<String>,

    /// What heap profiling may take of the time of each process, as a share of one CPU, or off; above it, allocations are
    /// sampled in windows at random times and scaled [default: 1%]
    #[arg(long, env = "PROFILER_HEAP_BUDGET", value_name = "SHARE")]
    heap_budget: Option<String>,

    /// For tests alone: the only way to probe functions that is tried
    #[arg(long, hide = true, value_name = "KIND", value_parser = ["session", "multi", "perf"])]
    test_heap_kind: Option<String>,

    /// For tests alone: go by it that seccomp filters kill for probed returns
    #[arg(long, hide = true)]
    test_heap_seccomp_kills: bool,

    /// For tests alone: sampled allocations in use that there is room for
    #[arg(long, hide = true, value_name = "SAMPLES")]
    test_heap_live_max: Option<u32>,

    /// What to log: error, warn, info, debug, trace, or a tracing filter [default: info]
    #[arg(long, env = "PROFILER_LOG", value_name = "FILTER")]
    log: Option<String>,

    /// How to log: text or json [default: text]
    #[arg(long, env = "PROFILER_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<String>,

    /// Which kinds of profiles to take: cpu, page_faults (which code makes the memory of processes grow) [default: cpu]
    #[arg(long, env = "PROFILER_PROFILES", value_name = "KIND", value_delimiter = ',')]
    profiles: Vec<String>,

    /// false detaches everything from the kernel and stays ready [default: true]
    #[arg(long, env = "PROFILER_ENABLED", value_name = "BOOL")]
    enabled: Option<String>,

    /// One more address, for kubelet and Prometheus: serves /metrics, /healthz and /readyz only, without a token
    #[arg(long, env = "PROFILER_METRICS_LISTEN", value_name = "ADDRESS:PORT")]
    metrics_listen: Option<String>,

    /// File with the bearer token that requests to --listen must bring; needed where that is not a loopback address
    #[arg(long, env = "PROFILER_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// File with the token that requests to the embedded backend must bring; needed where --backend-listen is not a loopback
    /// address
    #[arg(long, env = "PROFILER_BACKEND_TOKEN_FILE", value_name = "FILE")]
    backend_token_file: Option<PathBuf>,

    /// Where the lock of this node's agent is; a file `off` there detaches everything [default: /run/profiler]
    #[arg(long, env = "PROFILER_RUN_DIR", value_name = "DIR")]
    run_dir: Option<PathBuf>,

    /// Name of one of several agents of this node, each with a lock of its own
    #[arg(long, env = "PROFILER_INSTANCE", value_name = "NAME")]
    instance: Option<String>,

    /// true runs on a kernel that is known to break when it is profiled [default: false]
    #[arg(long, env = "PROFILER_ALLOW_KERNEL", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    allow_kernel: Option<String>,
}

/// `unwind = "dwarf"`, or `unwind.native = "dwarf"`, which says that interpreted code is not meant.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "unwind is dwarf or frame-pointers, and so is unwind.native, its only key")]
enum FileUnwind {
    Native(String),
    Table(UnwindTable),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct UnwindTable {
    native: String,
}

impl FileUnwind {
    fn native(self) -> String {
        match self {
            Self::Native(native) | Self::Table(UnwindTable { native }) => native,
        }
    }
}

/// The file's keys.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    frequency: Option<u32>,
    cpu_budget: Option<String>,
    memory_limit: Option<String>,
    window: Option<String>,
    listen: Option<String>,
    backend_listen: Option<String>,
    data_dir: Option<PathBuf>,
    cache_dir: Option<PathBuf>,
    #[serde(default)]
    debuginfod_urls: Vec<String>,
    unwind: Option<FileUnwind>,
    stack_depth: Option<u32>,
    #[serde(default)]
    target: Vec<FileTarget>,
    target_default: Option<bool>,
    #[serde(default)]
    upload: Vec<FileUpload>,
    upload_token_file: Option<PathBuf>,
    node: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    heap: Vec<HeapRule>,
    heap_budget: Option<String>,
    log: Option<String>,
    log_format: Option<String>,
    profiles: Option<Vec<String>>,
    enabled: Option<bool>,
    metrics_listen: Option<String>,
    token_file: Option<PathBuf>,
    backend_token_file: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    instance: Option<String>,
    allow_kernel: Option<bool>,
}

/// `"http://h/"` or `{ url = "http://h/", token_file = "/etc/profiler/token" }`
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum FileUpload {
    Plain(String),
    WithToken(UploadWithToken),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct UploadWithToken {
    url: String,
    token_file: Option<PathBuf>,
}

/// `{ match = "exe=postgres", rate = "64KiB", budget = "5%" }`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeapRule {
    #[serde(rename = "match")]
    matches: String,
    rate: Option<String>,
    budget: Option<String>,
}

/// One `[[target]]` of the file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileTarget {
    pid: Option<u32>,
    comm: Option<String>,
    cgroup: Option<PathBuf>,
    frequency: Option<u32>,
    #[serde(default = "is_enabled")]
    enabled: bool,
}

fn is_enabled() -> bool {
    true
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// How the callers of native code are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unwind {
    /// By tables made from call frame information; by frame pointers where there is none.
    Dwarf,
    /// By frame pointers alone.
    FramePointers,
}

/// The validated configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// Samples per second and CPU.
    pub(crate) frequency_hz: u32,
    /// What profiling may take of the node's CPU time; `None` for all of it.
    pub(crate) cpu_budget: Option<CpuShare>,
    /// How long a frequency is kept before its use is judged.
    pub(crate) budget_term: Duration,
    /// The bound of every map, table, cache and queue.
    pub(crate) memory: MemoryPlan,
    /// Length of a window.
    pub(crate) window: Duration,
    /// Address of the agent's own HTTP.
    pub(crate) listen: SocketAddr,
    /// Address of the embedded backend; unused when `uploads` is not empty.
    pub(crate) backend_listen: SocketAddr,
    /// Where the embedded backend keeps profiles.
    pub(crate) data_dir: PathBuf,
    /// Where names are kept for the next start.
    pub(crate) cache_dir: PathBuf,
    /// Servers for debug information; empty: none is asked.
    pub(crate) debuginfod_urls: Vec<Url>,
    /// How the callers of native code are found.
    pub(crate) unwind: Unwind,
    /// User frames of a stack, at most.
    pub(crate) stack_depth: u32,
    /// What is sampled.
    pub(crate) targets: Targets,
    /// Remote backends; empty means the embedded one.
    pub(crate) uploads: Vec<Destination>,
    /// Where the token of the only one of them was read from.
    pub(crate) upload_token_file: Option<PathBuf>,
    /// Label `node`.
    pub(crate) node: String,
    /// Labels of every profile.
    pub(crate) labels: Vec<(String, String)>,
    /// Whose heap is profiled; empty means nobody's.
    pub(crate) heap: heap::Rules,
    /// How, where a test says so.
    pub(crate) heap_options: heap::Options,
    /// Filter of log lines.
    pub(crate) log: String,
    /// Form of log lines.
    pub(crate) log_format: LogFormat,
    /// Kinds of profiles that are taken.
    pub(crate) profiles: Vec<String>,
    /// Whether anything is attached to the kernel.
    pub(crate) enabled: bool,
    /// A second address, which serves metrics and health only.
    pub(crate) metrics_listen: Option<SocketAddr>,
    /// What requests to `listen` must bring.
    pub(crate) token: Option<Token>,
    /// What requests to the embedded backend must bring.
    pub(crate) backend_token: Option<Token>,
    /// Where the lock and the switch are.
    pub(crate) run_dir: PathBuf,
    /// Name of this one of several agents.
    pub(crate) instance: Option<String>,
    /// Whether to run on a kernel that is known to be broken.
    pub(crate) allow_kernel: bool,
}

impl Config {
    /// Whether profiles of a type are taken.
    pub(crate) fn takes(&self, profile_type: ProfileType) -> bool {
        self.profiles.iter().any(|kind| kind == profile_type.name())
    }

    /// Sampling period in nanoseconds of CPU time.
    pub(crate) fn period_ns(&self) -> u64 {
        pipeline::period_ns(self.frequency_hz)
    }
}

/// A value that was not accepted: one line that names the key, the value, and what is accepted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) struct ConfigError {
    key: String,
    value: String,
    accepted: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, value, accepted } = self;
        write!(f, "{key}: {value:?} is not accepted; {accepted}")
    }
}

impl ConfigError {
    /// `accepted` says why the value is not accepted and what is.
    pub(crate) fn new(key: &str, value: &str, accepted: String) -> Self {
        Self { key: key.to_owned(), value: value.to_owned(), accepted }
    }
}

fn refuse(key: &str, value: impl fmt::Display, accepted: impl fmt::Display) -> ConfigError {
    ConfigError { key: key.to_owned(), value: value.to_string(), accepted: accepted.to_string() }
}

/// Where the configuration comes from. The file can be read again.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    flags: Flags,
    /// Keys given as flags and by the environment.
    given: BTreeMap<String, Origin>,
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Flag,
    Environment,
    File,
    Default,
}

impl Sources {
    /// `matches` are those that the flags were read from.
    pub(crate) fn new(flags: Flags, matches: &ArgMatches) -> Self {
        let origin = |id: &clap::Id| match matches.value_source(id.as_str())? {
            ValueSource::CommandLine => Some((id.to_string(), Origin::Flag)),
            ValueSource::EnvVariable => Some((id.to_string(), Origin::Environment)),
            _ => None,
        };
        Self { flags, given: matches.ids().filter_map(origin).collect() }
    }

    /// The configuration file, if one is named.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.flags.config.as_deref()
    }

    /// Whether the configuration is to be printed only.
    pub(crate) fn is_to_be_printed(&self) -> bool {
        self.flags.print_config
    }

    /// Makes the configuration from flags (with the environment in them) and the file they name.
    pub(crate) fn load(&self) -> Result<Config, ConfigError> {
        merge(self.flags.clone(), self.read_file()?.0)
    }

    fn read_file(&self) -> Result<(File, BTreeSet<String>), ConfigError> {
        self.file().map_or_else(|| Ok(Default::default()), read_file)
    }
}

fn read_file(path: &Path) -> Result<(File, BTreeSet<String>), ConfigError> {
    let accepted = "accepted: a readable TOML file of at most 1 MiB";
    let refused = |why: &dyn fmt::Display| refuse("config", path.display(), format!("{why}; {accepted}"));
    let bytes = fs::metadata(path).map_err(|error| refused(&error))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(refused(&format!("{bytes} bytes")));
    }
    let text = fs::read_to_string(path).map_err(|error| refused(&error))?;
    parse_file(&text).map_err(|why| refuse("config", path.display(), why))
}

/// The values, and the keys that are in the file.
fn parse_file(text: &str) -> Result<(File, BTreeSet<String>), String> {
    let refused = |error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count();
        let key =
            text.lines().nth(line).and_then(|text| text.split_once('=')).map_or("", |(key, _)| key.trim());
        let key = if key.is_empty() { String::new() } else { format!(", {key}") };
        // A message may have lines, for a terminal.
        format!("line {}{key}: {}", line + 1, error.message().trim().replace('\n', "; "))
    };
    let file = toml::from_str(text).map_err(refused)?;
    let table: toml::Table = toml::from_str(text).map_err(refused)?;
    Ok((file, table.into_iter().map(|(key, _)| key).collect()))
}

fn merge(flags: Flags, file: File) -> Result<Config, ConfigError> {
    let Flags {
        config: _,
        print_config: _,
        frequency,
        cpu_budget,
        test_budget_term,
        memory_limit,
        window,
        listen,
        backend_listen,
        data_dir,
        cache_dir,
        debuginfod_urls,
        unwind,
        stack_depth,
        pid,
        comm,
        cgroup,
        upload,
        node,
        label,
        heap,
        heap_budget,
        test_heap_kind,
        test_heap_seccomp_kills,
        test_heap_live_max,
        log,
        log_format,
        profiles,
        enabled,
        metrics_listen,
        token_file,
        backend_token_file,
        upload_token_file,
        run_dir,
        instance,
        allow_kernel,
    } = flags;
    let data_dir = data_dir.or(file.data_dir).unwrap_or_else(|| DEFAULT_DATA_DIR.into());
    let upload =
        if upload.is_empty() { file.upload } else { upload.into_iter().map(FileUpload::Plain).collect() };
    let upload_token_file = upload_token_file.or(file.upload_token_file);
    let debuginfod_urls = if debuginfod_urls.is_empty() { file.debuginfod_urls } else { debuginfod_urls };
    let profiles = if profiles.is_empty() { file.profiles } else { Some(profiles) };
    let config = Config {
        frequency_hz: parse_frequency(frequency.or(file.frequency.map(|hz| hz.to_string())))?,
        cpu_budget: parse_cpu_budget(cpu_budget.or(file.cpu_budget))?,
        budget_term: test_budget_term.map_or(budget::TERM, Duration::from_secs),
        memory: parse_memory(memory_limit.or(file.memory_limit), upload.is_empty())?,
        window: parse_window(window.or(file.window))?,
        listen: parse_address("listen", listen.or(file.listen).as_deref().unwrap_or(DEFAULT_LISTEN))?,
        backend_listen: parse_address(
            "backend-listen",
            backend_listen.or(file.backend_listen).as_deref().unwrap_or(DEFAULT_BACKEND_LISTEN),
        )?,
        cache_dir: cache_dir.or(file.cache_dir).unwrap_or_else(|| data_dir.join("cache")),
        debuginfod_urls: debuginfod_urls
            .iter()
            .map(|url| parse_debuginfod_url(url))
            .collect::<Result<_, _>>()?,
        data_dir,
        unwind: parse_unwind(unwind.or(file.unwind.map(FileUnwind::native)))?,
        stack_depth: parse_stack_depth(stack_depth.or(file.stack_depth.map(|depth| depth.to_string())))?,
        targets: parse_targets(&[pid, comm], cgroup, file.target, file.target_default)?,
        uploads: parse_uploads(&upload, upload_token_file.as_deref())?,
        upload_token_file,
        node: parse_node(node.or(file.node))?,
        labels: parse_labels(file.labels, &label)?,
        heap: heap::Rules {
            list: parse_heap(&file.heap, &heap)?,
            budget: parse_heap_budget(heap_budget.or(file.heap_budget))?,
        },
        heap_options: heap_options(test_heap_kind.as_deref(), test_heap_seccomp_kills, test_heap_live_max),
        log: parse_log(log.or(file.log))?,
        log_format: parse_log_format(log_format.or(file.log_format))?,
        profiles: parse_profiles(profiles)?,
        enabled: parse_bool("enabled", enabled, file.enabled)?.unwrap_or(true),
        metrics_listen: metrics_listen
            .or(file.metrics_listen)
            .map(|text| parse_address("metrics-listen", &text))
            .transpose()?,
        token: token_file.or(file.token_file).map(|file| read_token("token-file", &file)).transpose()?,
        backend_token: backend_token_file
            .or(file.backend_token_file)
            .map(|file| read_token("backend-token-file", &file))
            .transpose()?,
        run_dir: run_dir.or(file.run_dir).unwrap_or_else(|| DEFAULT_RUN_DIR.into()),
        instance: instance.or(file.instance).map(parse_instance).transpose()?,
        allow_kernel: parse_bool("allow-kernel", allow_kernel, file.allow_kernel)?.unwrap_or(false),
    };
    check_listeners(&config)?;
    let Config { data_dir, cache_dir, run_dir, .. } = &config;
    for (key, path) in [("data-dir", data_dir), ("cache-dir", cache_dir), ("run-dir", run_dir)] {
        check_directory(key, path)?;
    }
    Ok(config)
}

fn parse_bool(key: &str, flag: Option<String>, file: Option<bool>) -> Result<Option<bool>, ConfigError> {
    let Some(text) = flag else { return Ok(file) };
    text.parse().map(Some).map_err(|_| refuse(key, text, "accepted: true, false"))
}

/// An empty list is none.
fn parse_profiles(kinds: Option<Vec<String>>) -> Result<Vec<String>, ConfigError> {
    let Some(mut kinds) = kinds else { return Ok(vec![ProfileType::Cpu.name().to_owned()]) };
    if let Some(unknown) = kinds.iter().find(|kind| !PROFILE_KINDS.contains(&kind.as_str())) {
        return Err(refuse("profiles", unknown, format!("accepted: {}", PROFILE_KINDS.join(", "))));
    }
    kinds.sort();
    kinds.dedup();
    Ok(kinds)
}

fn parse_instance(name: String) -> Result<String, ConfigError> {
    let is_plain =
        name.chars().all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.'));
    if is_plain && (1..=INSTANCE_CHARS_MAX).contains(&name.len()) {
        return Ok(name);
    }
    let accepted = format!("accepted: 1 to {INSTANCE_CHARS_MAX} letters, digits, -, _ and .");
    Err(refuse("instance", name, accepted))
}

fn read_token(key: &str, file: &Path) -> Result<Token, ConfigError> {
    Token::read(file)
        .map_err(|error| refuse(key, file.display(), format!("{error}; accepted: {}", Token::ACCEPTED)))
}

/// Refuses a directory that could never be made: a file is in its place, or above it. Whether one may write there is seen
/// when it is used.
fn check_directory(key: &str, path: &Path) -> Result<(), ConfigError> {
    let found = path.ancestors().find_map(|at| Some((at, fs::metadata(at).ok()?)));
    match found {
        Some((at, metadata)) if !metadata.is_dir() => {
            let why = format!("{} is no directory", at.display());
            Err(refuse(
                key,
                path.display(),
                format!("{why}; accepted: a directory, or where one can be made"),
            ))
        }
        _ => Ok(()),
    }
}

/// Addresses that a network reaches need a token.
fn check_listeners(config: &Config) -> Result<(), ConfigError> {
    let Config { listen, backend_listen, token, backend_token, uploads, .. } = config;
    if !listen.ip().is_loopback() && token.is_none() {
        let accepted =
            "without --token-file, a loopback address; --metrics-listen serves metrics and health elsewhere";
        return Err(refuse("listen", listen, format!("accepted: {accepted}")));
    }
    let has_backend = uploads.is_empty();
    if has_backend && !backend_listen.ip().is_loopback() && backend_token.is_none() {
        let accepted = "accepted: without --backend-token-file, a loopback address";
        return Err(refuse("backend-listen", backend_listen, accepted));
    }
    Ok(())
}

pub(crate) fn parse_frequency(value: Option<String>) -> Result<u32, ConfigError> {
    let Some(text) = value else { return Ok(DEFAULT_FREQUENCY_HZ) };
    let accepted = format!("accepted: {FREQUENCY_HZ_MIN} to {FREQUENCY_HZ_MAX} samples per second and CPU");
    let hz = text.parse().ok().filter(|hz| (FREQUENCY_HZ_MIN..=FREQUENCY_HZ_MAX).contains(hz));
    hz.ok_or_else(|| refuse("frequency", text, accepted))
}

fn parse_stack_depth(value: Option<String>) -> Result<u32, ConfigError> {
    let max = USER_FRAMES_MAX as u32;
    let Some(text) = value else { return Ok(max) };
    let depth = text.parse().ok().filter(|depth| (USER_FRAMES_LIMIT_MIN..=max).contains(depth));
    let accepted = format!("accepted: {USER_FRAMES_LIMIT_MIN} to {max} frames");
    depth.ok_or_else(|| refuse("stack-depth", text, accepted))
}

/// Flags make targets that are sampled, ahead of the file's. Where they do, what matches none is not, unless the file says so.
fn parse_targets(
    [pids, comms]: &[Vec<String>; 2],
    cgroups: Vec<PathBuf>,
    file: Vec<FileTarget>,
    default: Option<bool>,
) -> Result<Targets, ConfigError> {
    let wanted = Target { is_wanted: true, ..Target::default() };
    let by_pid = pids.iter().map(|pid| Ok(Target { pid: Some(parse_pid(pid)?), ..wanted.clone() }));
    let by_comm = comms.iter().map(|comm| Ok(Target { comm: Some(parse_comm(comm)?), ..wanted.clone() }));
    let by_cgroup = cgroups.into_iter().map(|cgroup| Ok(Target { cgroup: Some(cgroup), ..wanted.clone() }));
    let flags = by_pid.chain(by_comm).chain(by_cgroup).collect::<Result<Vec<_>, ConfigError>>()?;
    let is_default_wanted = default.unwrap_or(flags.is_empty());
    let file = file.into_iter().map(parse_file_target).collect::<Result<Vec<_>, ConfigError>>()?;
    let list = [flags, file].concat();
    let count = list.len();
    Targets::new(list, is_default_wanted)
        .ok_or_else(|| refuse("target", count, format!("accepted: at most {} targets", Targets::MAX)))
}

fn parse_file_target(target: FileTarget) -> Result<Target, ConfigError> {
    let FileTarget { pid, comm, cgroup, frequency, enabled } = target;
    if pid.is_none() && comm.is_none() && cgroup.is_none() {
        return Err(refuse(
            "target",
            "",
            "accepted: one or more of pid, comm, cgroup; target_default is for the rest",
        ));
    }
    let frequency_hz = frequency.map(|hz| parse_frequency(Some(hz.to_string()))).transpose()?;
    let comm = comm.as_deref().map(parse_comm).transpose()?;
    let pid = pid.map(|pid| parse_pid(&pid.to_string())).transpose()?;
    Ok(Target { pid, comm, cgroup, frequency_hz, is_wanted: enabled })
}

fn parse_pid(text: &str) -> Result<u32, ConfigError> {
    let pid = text.parse().ok().filter(|&pid| pid > 0);
    pid.ok_or_else(|| refuse("pid", text, "accepted: the id of a process in the machine's own pid namespace"))
}

fn parse_comm(text: &str) -> Result<CommPrefix, ConfigError> {
    CommPrefix::new(text)
        .ok_or_else(|| refuse("comm", text, "accepted: 1 to 15 bytes, the beginning of a process's name"))
}

fn parse_cpu_budget(value: Option<String>) -> Result<Option<CpuShare>, ConfigError> {
    match value.as_deref() {
        None => Ok(Some(CpuShare::DEFAULT)),
        Some("off") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|()| {
            refuse(
                "cpu-budget",
                text,
                "accepted: a share of all CPUs above 0% and up to 100%, as 1% or 0.5%, or off",
            )
        }),
    }
}

fn parse_memory(value: Option<String>, has_backend: bool) -> Result<MemoryPlan, ConfigError> {
    let bytes = match &value {
        Some(text) => parse_bytes(text).ok_or_else(|| {
            refuse("memory-limit", text, "accepted: a number of MiB or GiB, as 128MiB or 1GiB")
        })?,
        None => memory::default_limit_bytes("/proc".as_ref()),
    };
    MemoryPlan::for_limit(bytes, has_backend).map_err(|TooSmall { least_bytes }| {
        let least = least_bytes.div_ceil(1 << 20);
        let shown =
            value.unwrap_or_else(|| format!("{}MiB (90% of the limit of the agent's cgroup)", bytes >> 20));
        let with = if has_backend { "with the embedded backend" } else { "without the embedded backend" };
        refuse("memory-limit", shown, format!("accepted: {least}MiB and more, {with}"))
    })
}

/// `128MiB`, `1GiB`.
fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn parse_window(value: Option<String>) -> Result<Duration, ConfigError> {
    let Some(text) = value else { return Ok(DEFAULT_WINDOW) };
    parse_duration(&text)
        .filter(|window| (WINDOW_MIN..=WINDOW_MAX).contains(window))
        .ok_or_else(|| refuse("window", &text, "accepted: 1s to 10m, as 10s, 1500ms or 2m"))
}

/// `10s`, `1500ms`, `2m`.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_secs(number.checked_mul(60)?)),
        _ => None,
    }
}

fn parse_address(key: &str, text: &str) -> Result<SocketAddr, ConfigError> {
    text.parse()
        .map_err(|_| refuse(key, text, "accepted: an IP address and a port, as 127.0.0.1:7700 or [::1]:7700"))
}

/// Destinations have different names, for metrics and messages tell them apart by these.
fn parse_uploads(given: &[FileUpload], token_file: Option<&Path>) -> Result<Vec<Destination>, ConfigError> {
    if let Some(file) = token_file
        && given.len() != 1
    {
        let accepted =
            "accepted: with one upload; several have { url = .., token_file = .. } each in the file";
        return Err(refuse("upload-token-file", file.display(), accepted));
    }
    let mut destinations: Vec<Destination> = Vec::new();
    for upload in given {
        let (text, own_file) = match upload {
            FileUpload::Plain(text) => (text, None),
            FileUpload::WithToken(UploadWithToken { url, token_file }) => (url, token_file.as_deref()),
        };
        let token = own_file.or(token_file).map(|file| read_token("upload-token-file", file)).transpose()?;
        let destination: Destination =
            text.parse().map_err(|why: String| refuse("upload", redacted(text), why))?;
        let destination = destination.with_token(token);
        if destinations.iter().any(|known| known.name() == destination.name()) {
            return Err(refuse("upload", redacted(text), "given twice; accepted: each backend once"));
        }
        destinations.push(destination);
    }
    Ok(destinations)
}

/// Without credentials and query, so that there is no secret in it.
fn parse_debuginfod_url(text: &str) -> Result<Url, ConfigError> {
    let accepted = "accepted: http://HOST[:PORT][/PATH] or https://…, without credentials or a query";
    let is_plain = |url: &Url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none()
    };
    let url = Url::parse(text).ok().filter(is_plain);
    url.ok_or_else(|| refuse("debuginfod-url", redacted(text), accepted))
}

/// What may be shown of a URL's text, which need not be a URL: nothing that could be credentials or a query.
fn redacted(text: &str) -> String {
    let (scheme, rest) = text.split_once("://").map_or(("", text), |(scheme, rest)| (scheme, rest));
    let separator = if scheme.is_empty() { "" } else { "://" };
    // The last @: a password that was not escaped may hold others.
    let (credentials, rest) = rest.rsplit_once('@').map_or(("", rest), |(_, rest)| ("***@", rest));
    let (rest, query) = rest.split_once(['?', '#']).map_or((rest, ""), |(rest, _)| (rest, "?***"));
    format!("{scheme}{separator}{credentials}{rest}{query}")
}

fn parse_node(value: Option<String>) -> Result<String, ConfigError> {
    let node = match value {
        Some(node) => node,
        None => fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
    };
    if node.is_empty() {
        return Err(refuse("node", node, "accepted: a name; the machine's host name is empty"));
    }
    Ok(node)
}

/// Flags win over the file, label by label.
fn parse_labels(
    file: BTreeMap<String, String>,
    flags: &[String],
) -> Result<Vec<(String, String)>, ConfigError> {
    let accepted = "accepted: NAME=VALUE, NAME of letters, digits and _, not starting with a digit or __, \
                    not pid, comm or thread_name";
    let mut labels = file;
    for text in flags {
        let (name, value) = text.split_once('=').ok_or_else(|| refuse("label", text, accepted))?;
        labels.insert(name.to_owned(), value.to_owned());
    }
    for (name, value) in &labels {
        if !is_label_name(name) || SAMPLE_LABELS.contains(&name.as_str()) || value.is_empty() {
            return Err(refuse("label", format!("{name}={value}"), accepted));
        }
    }
    Ok(labels.into_iter().collect())
}

/// Labels of samples inside a profile. A label of the same name on the profile would hide them.
pub(crate) const SAMPLE_LABELS: [&str; 3] = ["comm", "pid", "thread_name"];

/// Source: Prometheus data model, label names; two leading underscores are for internal use.
fn is_label_name(name: &str) -> bool {
    push::is_label_name(name) && !name.starts_with("__")
}

/// Rules of flags come before those of the file, and the first that matches decides.
fn parse_heap(file: &[HeapRule], flags: &[String]) -> Result<Vec<heap::Rule>, ConfigError> {
    let file = file.iter().map(|HeapRule { matches, rate, budget }| {
        let parts = [Some(matches), rate.as_ref(), budget.as_ref()];
        parts.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join("@")
    });
    let accepted = "accepted: NAME=VALUE[@RATE][@BUDGET], NAME a label, pid, family or cgroup, RATE in bytes, KiB or MiB, below 4 GiB, \
                    BUDGET as 1% or off";
    let rule = |text: String| heap::parse(&text).ok_or_else(|| refuse("heap", &text, accepted));
    flags.iter().cloned().chain(file).map(rule).collect()
}

pub(crate) fn parse_heap_budget(value: Option<String>) -> Result<heap::Budget, ConfigError> {
    let Some(text) = value else { return Ok(heap::Budget::DEFAULT) };
    text.parse().map_err(|()| {
        refuse(
            "heap-budget",
            &text,
            "accepted: a share of one CPU above 0% and up to 100%, as 1% or 0.5%, or off",
        )
    })
}

fn heap_options(kind: Option<&str>, seccomp_kills: bool, live_max: Option<u32>) -> heap::Options {
    let default = heap::Options::default();
    let kinds = match kind {
        None => default.kinds,
        Some("session") => vec![UprobeKind::Session],
        Some("multi") => vec![UprobeKind::Multi],
        Some(_) => vec![UprobeKind::Perf],
    };
    heap::Options { kinds, seccomp_kills, live_max: live_max.unwrap_or(default.live_max) }
}

fn parse_unwind(value: Option<String>) -> Result<Unwind, ConfigError> {
    match value.as_deref() {
        None | Some("dwarf") => Ok(Unwind::Dwarf),
        Some("frame-pointers") => Ok(Unwind::FramePointers),
        Some(other) => Err(refuse("unwind", other, "accepted: dwarf, frame-pointers")),
    }
}

fn parse_log(filter: Option<String>) -> Result<String, ConfigError> {
    let filter = filter.unwrap_or_else(|| "info".to_owned());
    logs::parse_filter(&filter)?;
    Ok(filter)
}

fn parse_log_format(value: Option<String>) -> Result<LogFormat, ConfigError> {
    match value.as_deref() {
        None | Some("text") => Ok(LogFormat::Text),
        Some("json") => Ok(LogFormat::Json),
        Some(other) => Err(refuse("log-format", other, "accepted: text, json")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use clap::FromArgMatches as _;

    use super::*;

    fn config(args: &[&str], file: &str) -> Result<Config, ConfigError> {
        merge(sources(args).flags, parse_file(file).map_err(|why| refuse("config", "file", why))?.0)
    }

    /// Where the configuration of these flags comes from, without the environment of the test.
    pub(crate) fn sources(args: &[&str]) -> Sources {
        let command = Flags::augment_args(clap::Command::new("profiler-agent"));
        let matches = command
            .try_get_matches_from([&["profiler-agent"], args].concat())
            .expect("flags that clap knows");
        let flags = Flags::from_arg_matches(&matches).expect("flags that clap knows");
        Sources::new(flags, &matches)
    }

    #[track_caller]
    fn refused(args: &[&str], file: &str, parts: &[&str]) {
        let error = config(args, file).expect_err("refused").to_string();
        assert!(!error.contains('\n'), "one line: {error}");
        for part in parts {
            assert!(error.contains(part), "{error:?} names {part:?}");
        }
    }

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let config = config(&[], "").expect("defaults are valid");
        assert_eq!(config.frequency_hz, 19);
        assert_eq!(config.cpu_budget.map(|budget| budget.to_string()), Some("1%".into()));
        assert_eq!(config.window, Duration::from_secs(10));
        assert_eq!(config.listen.to_string(), "127.0.0.1:7701");
        assert_eq!(config.backend_listen.to_string(), "127.0.0.1:7700");
        assert_eq!(config.data_dir, Path::new("/var/lib/profiler"));
        assert_eq!(config.cache_dir, Path::new("/var/lib/profiler/cache"));
        assert_eq!(config.unwind, Unwind::Dwarf);
        assert_eq!(config.stack_depth, 1024);
        assert_eq!(config.uploads, []);
    }

    #[test]
    fn targets_of_flags_come_before_those_of_the_file() {
        let file = "[[target]]\ncgroup = \"/a\"\nfrequency = 5\n[[target]]\ncomm = \"b\"\nenabled = false\n";
        let targets = config(&[], file).expect("valid").targets;
        assert_eq!((targets.list().len(), targets.is_default_wanted()), (2, true));
        let targets = config(&["-p", "7,8", "--comm", "x"], file).expect("valid").targets;
        assert_eq!((targets.list().len(), targets.is_default_wanted()), (5, false));
        assert_eq!(targets.list()[0], Target { pid: Some(7), is_wanted: true, ..Target::default() });
        assert_eq!(targets.list()[3].frequency_hz, Some(5));
        assert!(!targets.list()[4].is_wanted);
        let targets = config(&["-p", "7"], "target_default = true").expect("valid").targets;
        assert!(targets.is_default_wanted());
        assert!(config(&[], "").expect("valid").targets.want_everything());
    }

    #[test]
    fn bad_targets_are_refused() {
        refused(&["-p", "0"], "", &["pid", "\"0\""]);
        refused(&["--comm", "a name of sixteen"], "", &["comm", "15 bytes"]);
        refused(&[], "[[target]]\nfrequency = 5\n", &["target", "pid, comm, cgroup"]);
        refused(&[], "[[target]]\npid = 1\nfrequency = 0\n", &["frequency", "\"0\""]);
        refused(&[], &"[[target]]\npid = 1\n".repeat(17), &["target", "17", "at most 16"]);
    }

    #[test]
    fn no_kind_of_profiles_is_a_choice() {
        let kinds = |args: &[&str], file| config(args, file).expect("valid").profiles;
        assert_eq!((kinds(&[], ""), kinds(&[], "profiles = []")), (vec!["cpu".to_owned()], vec![]));
        assert_eq!(kinds(&["--profiles", "cpu,cpu"], "profiles = []"), ["cpu"]);
        refused(&["--profiles", "gpu"], "", &["profiles", "\"gpu\"", "accepted: cpu"]);
    }

    #[test]
    fn each_destination_may_have_a_token_of_its_own() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let token = |name: &str| {
            let file = directory.path().join(name);
            fs::write(&file, "0123456789abcdef").expect("write the token");
            fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600))
                .expect("set the mode");
            file.to_str().expect("a plain path").to_owned()
        };
        let (one, two) = (token("one"), token("two"));
        let files = |args: &[&str], file: &str| -> Vec<Option<PathBuf>> {
            let uploads = config(args, file).expect("valid").uploads;
            uploads.iter().map(|to| to.token().map(|token| token.file().to_owned())).collect()
        };
        let file = format!("upload = [\"http://a/\", {{ url = \"http://b/\", token_file = \"{one}\" }}]\n");
        assert_eq!(files(&[], &file), [None, Some(one.clone().into())]);
        assert_eq!(
            files(&["--upload", "http://c/", "--upload-token-file", &two], &file),
            [Some(two.clone().into())]
        );
        refused(&["--upload-token-file", &two], &file, &["upload-token-file", "one upload"]);
        refused(&[], "upload = [{ url = \"http://b/\", tokn = \"x\" }]\n", &["line 1", "upload"]);
        let shown = config(&[], &file).expect("valid").values();
        let upload = shown.into_iter().find(|(key, _)| *key == "upload").and_then(|(_, value)| value);
        let upload = upload.expect("it has a value").to_string();
        assert!(upload.contains(&one) && !upload.contains("0123456789abcdef"), "{upload}");
    }

    #[test]
    fn directories_that_could_never_be_made_are_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("file");
        fs::write(&file, "").expect("write");
        let below = file.join("below");
        for (flag, path) in [("--data-dir", &file), ("--cache-dir", &below), ("--run-dir", &below)] {
            let path = path.to_str().expect("a plain path");
            refused(&[flag, path], "", &[flag.trim_start_matches('-'), path, "is no directory", "accepted:"]);
        }
        let new = directory.path().join("new/er");
        config(&["--data-dir", new.to_str().expect("a plain path")], "").expect("valid");
    }

    #[test]
    fn addresses_that_a_network_reaches_need_a_token() {
        refused(
            &["--backend-listen", "0.0.0.0:7700"],
            "",
            &["backend-listen", "0.0.0.0:7700", "--backend-token-file"],
        );
        refused(&[], "listen = \"[::]:1\"", &["listen", "[::]:1", "--token-file"]);
        // Nobody listens there.
        config(&["--upload", "http://h/", "--backend-listen", "0.0.0.0:7700"], "").expect("valid");
        config(&["--backend-listen", "[::1]:7700"], "").expect("valid");
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = "frequency = 49\nunwind = \"frame-pointers\"\nwindow = \"20s\"\n[labels]\ncluster = \"c\"\nteam = \"t\"\n";
        let config = config(&["-F", "99", "--label", "cluster=d"], file).expect("valid");
        assert_eq!((config.frequency_hz, config.window), (99, Duration::from_secs(20)));
        assert_eq!(config.unwind, Unwind::FramePointers);
        assert_eq!(config.labels, [("cluster".into(), "d".into()), ("team".into(), "t".into())]);
    }

    #[test]
    fn how_native_code_is_unwound_has_a_key_of_its_own_as_well() {
        for file in ["unwind.native = \"frame-pointers\"\n", "[unwind]\nnative = \"frame-pointers\"\n"] {
            assert_eq!(config(&[], file).expect("valid").unwind, Unwind::FramePointers, "{file}");
            assert_eq!(config(&["--unwind", "dwarf"], file).expect("valid").unwind, Unwind::Dwarf, "{file}");
        }
        refused(&[], "unwind.native = \"lbr\"\n", &["unwind", "lbr", "frame-pointers"]);
        refused(&[], "unwind.python = \"frames\"\n", &["unwind.native"]);
    }

    #[test]
    fn bad_values_are_refused_with_what_is_accepted() {
        refused(&["-F", "0"], "", &["frequency", "\"0\"", "1 to 1000"]);
        refused(&["-F", "1001"], "", &["frequency", "1001"]);
        refused(&["--cpu-budget", "1"], "", &["cpu-budget", "\"1\"", "0.5%", "off"]);
        refused(&[], "cpu_budget = \"0%\"\n", &["cpu-budget", "0%"]);
        refused(&["--memory-limit", "128"], "", &["memory-limit", "\"128\"", "128MiB"]);
        refused(&["--memory-limit", "63MiB"], "", &["memory-limit", "63MiB", "64MiB and more"]);
        refused(
            &["--upload", "http://h/", "--memory-limit", "47MiB"],
            "",
            &["memory-limit", "48MiB and more"],
        );
        refused(&["--window", "10"], "", &["window", "\"10\"", "10s"]);
        refused(&["--window", "0s"], "", &["window"]);
        refused(&["--listen", "localhost"], "", &["listen", "localhost", "port"]);
        refused(&["--upload", "kafka+http://x"], "", &["upload", "kafka"]);
        refused(&["--label", "no-dash=1"], "", &["label", "no-dash=1"]);
        refused(&["--label", "__name__=x"], "", &["label"]);
        refused(&["--label", "empty="], "", &["label"]);
        refused(&["--label", "pid=1"], "", &["label", "pid=1", "not pid"]);
        refused(&[], "[labels]\ncomm = \"x\"\n", &["label", "comm=x"]);
        refused(&["--label", "thread_name=x"], "", &["label", "thread_name=x"]);
        refused(&["-F", "fast"], "", &["frequency", "\"fast\"", "1 to 1000"]);
        refused(&["--upload", "http://h/,http://h/?tenant=b"], "", &["upload", "twice"]);
        refused(&["--unwind", "lbr"], "", &["unwind", "lbr", "frame-pointers"]);
        refused(&["--stack-depth", "126"], "", &["stack-depth", "126", "127 to 1024"]);
        refused(&[], "stack_depth = 1025", &["stack-depth", "1025"]);
        refused(&["--log-format", "xml"], "", &["log-format", "xml", "json"]);
    }

    #[test]
    fn a_refused_upload_is_shown_without_its_secrets() {
        for upload in [
            "pyroscope+https://user:secret@h/",
            "https://user:sec/ret@h:x/",
            "ftp://us?er:secret@h/",
            "ftp://h/?token=secret",
            "ftp://h/#secret",
            "user:secret@h/",
        ] {
            let error = config(&["--upload", upload], "").expect_err("refused").to_string();
            assert!(!error.contains("ret"), "{error}");
        }
        refused(&["--upload", "ftp://user:secret@h/p?t=secret"], "", &["\"ftp://***@h/p?***\""]);
    }

    #[test]
    fn the_file_is_refused_by_line() {
        refused(&[], "frequency = 19\nfrequncy = 3\n", &["line 2", "frequncy"]);
        refused(&[], "frequency = \"fast\"\n", &["line 1"]);
    }

    #[test]
    fn servers_for_debug_information_are_none_unless_they_are_named() {
        assert!(config(&[], "").expect("valid").debuginfod_urls.is_empty());
        let urls = |args: &[&str], file| -> Vec<String> {
            let urls = config(args, file).expect("valid").debuginfod_urls;
            urls.iter().map(ToString::to_string).collect()
        };
        let file = "debuginfod_urls = [\"https://b/x\"]";
        assert_eq!(urls(&[], file), ["https://b/x"]);
        assert_eq!(urls(&["--debuginfod-url", "http://a,http://c"], file), ["http://a/", "http://c/"]);
        for bad in ["a", "ftp://a", "http://u:secret@a/", "http://a/?secret", "file:///a"] {
            let error = config(&["--debuginfod-url", bad], "").expect_err(bad).to_string();
            assert!(error.starts_with("debuginfod-url: ") && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_refused_by_name() {
        let error = sources(&["--config", "/nowhere/x.toml"]).load().expect_err("refused").to_string();
        assert!(error.contains("/nowhere/x.toml"), "{error}");
    }
}
