//! Flags, environment and file, in this order, make one validated [`Config`]. Nothing below parses.

use std::{
    collections::BTreeMap,
    fmt, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Parser;
use profiler_common::limits::{FREQUENCY_HZ_MAX, FREQUENCY_HZ_MIN};
use profiler_pprof::push;
use serde::Deserialize;

use crate::{export::Destination, heap};

const DEFAULT_FREQUENCY_HZ: u32 = 19;
const DEFAULT_WINDOW: Duration = Duration::from_secs(10);
const WINDOW_MIN: Duration = Duration::from_secs(1);
const WINDOW_MAX: Duration = Duration::from_secs(600);
const DEFAULT_LISTEN: &str = "127.0.0.1:7701";
const DEFAULT_BACKEND_LISTEN: &str = "127.0.0.1:7700";
const DEFAULT_DATA_DIR: &str = "/var/lib/profiler";
/// Bytes of a configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Samples the stacks of every process on this machine and shows them as flame graphs.
///
/// Without --upload, profiles are kept and shown by the backend built into this program.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "profiler-agent", version, max_term_width = 100)]
pub(crate) struct Flags {
    /// Configuration file (TOML). Keys are the long flags with underscores: listen, backend_listen, data_dir,
    /// frequency, window, unwind, upload, node, labels, heap, log, log_format. Flags win over the environment, which wins over the
    /// file.
    #[arg(long, env = "PROFILER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    /// Samples per second and CPU, 1 to 1000 [default: 19]
    #[arg(short = 'F', long, env = "PROFILER_FREQUENCY", value_name = "HZ")]
    frequency: Option<String>,

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

    /// How to find the callers of native code: dwarf (unwind tables made from each executable's .eh_frame; frame
    /// pointers where there are none) or frame-pointers [default: dwarf]
    #[arg(long, env = "PROFILER_UNWIND", value_name = "HOW")]
    unwind: Option<String>,

    /// Send profiles to a remote backend instead; may be given more than once. KIND is `profiler`
    #[arg(
        long,
        env = "PROFILER_UPLOAD",
        hide_env_values = true,
        value_name = "[KIND+]URL",
        value_delimiter = ','
    )]
    upload: Vec<String>,

    /// Name of this node: the label `node` [default: the host name]
    #[arg(long, env = "PROFILER_NODE", value_name = "NAME")]
    node: Option<String>,

    /// Label for every profile of this agent; may be given more than once
    #[arg(long, env = "PROFILER_LABEL", value_name = "NAME=VALUE", value_delimiter = ',')]
    label: Vec<String>,

    /// Profile the heap of processes with a label: NAME=VALUE[@RATE], as exe=postgres@64KiB; NAME is a label of their
    /// profiles or pid, RATE the mean bytes between samples [default: 512KiB]; may be given more than once. x86-64,
    /// kernel 6.13
    #[arg(long, env = "PROFILER_HEAP", value_name = "MATCH", value_delimiter = ',')]
    heap: Vec<String>,

    /// What to log: error, warn, info, debug, trace, or a tracing filter [default: info]
    #[arg(long, env = "PROFILER_LOG", value_name = "FILTER")]
    log: Option<String>,

    /// How to log: text or json [default: text]
    #[arg(long, env = "PROFILER_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<String>,
}

/// The file's keys.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    frequency: Option<u32>,
    window: Option<String>,
    listen: Option<String>,
    backend_listen: Option<String>,
    data_dir: Option<PathBuf>,
    unwind: Option<String>,
    #[serde(default)]
    upload: Vec<String>,
    node: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    heap: Vec<HeapRule>,
    log: Option<String>,
    log_format: Option<String>,
}

/// `{ match = "exe=postgres", rate = "64KiB" }`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeapRule {
    #[serde(rename = "match")]
    matches: String,
    rate: Option<String>,
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
    /// Length of a window.
    pub(crate) window: Duration,
    /// Address of the agent's own HTTP.
    pub(crate) listen: SocketAddr,
    /// Address of the embedded backend; unused when `uploads` is not empty.
    pub(crate) backend_listen: SocketAddr,
    /// Where the embedded backend keeps profiles.
    pub(crate) data_dir: PathBuf,
    /// How the callers of native code are found.
    pub(crate) unwind: Unwind,
    /// Remote backends; empty means the embedded one.
    pub(crate) uploads: Vec<Destination>,
    /// Label `node`.
    pub(crate) node: String,
    /// Labels of every profile.
    pub(crate) labels: Vec<(String, String)>,
    /// Whose heap is profiled; empty means nobody's.
    pub(crate) heap: Vec<heap::Rule>,
    /// Filter of log lines.
    pub(crate) log: String,
    /// Form of log lines.
    pub(crate) log_format: LogFormat,
}

impl Config {
    /// Sampling period in nanoseconds of CPU time.
    pub(crate) fn period_ns(&self) -> u64 {
        1_000_000_000 / u64::from(self.frequency_hz)
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

/// Makes the configuration from flags (with the environment in them) and the file they name.
pub(crate) fn load(flags: Flags) -> Result<Config, ConfigError> {
    let file = match &flags.config {
        Some(path) => read_file(path)?,
        None => File::default(),
    };
    merge(flags, file)
}

fn read_file(path: &Path) -> Result<File, ConfigError> {
    let accepted = "accepted: a readable TOML file of at most 1 MiB";
    let refused = |why: &dyn fmt::Display| refuse("config", path.display(), format!("{why}; {accepted}"));
    let bytes = fs::metadata(path).map_err(|error| refused(&error))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(refused(&format!("{bytes} bytes")));
    }
    let text = fs::read_to_string(path).map_err(|error| refused(&error))?;
    parse_file(&text).map_err(|why| refuse("config", path.display(), why))
}

fn parse_file(text: &str) -> Result<File, String> {
    toml::from_str(text).map_err(|error| {
        let line = error
            .span()
            .map_or(0, |span| text.get(..span.start).unwrap_or_default().matches('\n').count() + 1);
        format!("line {line}: {}", error.message())
    })
}

fn merge(flags: Flags, file: File) -> Result<Config, ConfigError> {
    let Flags {
        config: _,
        frequency,
        window,
        listen,
        backend_listen,
        data_dir,
        unwind,
        upload,
        node,
        label,
        heap,
        log,
        log_format,
    } = flags;
    let upload = if upload.is_empty() { file.upload } else { upload };
    Ok(Config {
        frequency_hz: parse_frequency(frequency.or(file.frequency.map(|hz| hz.to_string())))?,
        window: parse_window(window.or(file.window))?,
        listen: parse_address("listen", listen.or(file.listen), DEFAULT_LISTEN)?,
        backend_listen: parse_address(
            "backend-listen",
            backend_listen.or(file.backend_listen),
            DEFAULT_BACKEND_LISTEN,
        )?,
        data_dir: data_dir.or(file.data_dir).unwrap_or_else(|| DEFAULT_DATA_DIR.into()),
        unwind: parse_unwind(unwind.or(file.unwind))?,
        uploads: parse_uploads(&upload)?,
        node: parse_node(node.or(file.node))?,
        labels: parse_labels(file.labels, &label)?,
        heap: parse_heap(&file.heap, &heap)?,
        log: log.or(file.log).unwrap_or_else(|| "info".to_owned()),
        log_format: parse_log_format(log_format.or(file.log_format))?,
    })
}

fn parse_frequency(value: Option<String>) -> Result<u32, ConfigError> {
    let Some(text) = value else { return Ok(DEFAULT_FREQUENCY_HZ) };
    let accepted = format!("accepted: {FREQUENCY_HZ_MIN} to {FREQUENCY_HZ_MAX} samples per second and CPU");
    let hz = text.parse().ok().filter(|hz| (FREQUENCY_HZ_MIN..=FREQUENCY_HZ_MAX).contains(hz));
    hz.ok_or_else(|| refuse("frequency", text, accepted))
}

fn parse_window(value: Option<String>) -> Result<Duration, ConfigError> {
    let Some(text) = value else { return Ok(DEFAULT_WINDOW) };
    parse_duration(&text)
        .filter(|window| (WINDOW_MIN..=WINDOW_MAX).contains(window))
        .ok_or_else(|| refuse("window", &text, "accepted: 1s to 10m, as 10s, 1500ms or 2m"))
}

/// `10s`, `1500ms`, `2m`.
fn parse_duration(text: &str) -> Option<Duration> {
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

fn parse_address(key: &str, value: Option<String>, default: &str) -> Result<SocketAddr, ConfigError> {
    let text = value.as_deref().unwrap_or(default);
    text.parse()
        .map_err(|_| refuse(key, text, "accepted: an IP address and a port, as 127.0.0.1:7700 or [::1]:7700"))
}

/// Destinations have different names, for metrics and messages tell them apart by these.
fn parse_uploads(texts: &[String]) -> Result<Vec<Destination>, ConfigError> {
    let mut destinations: Vec<Destination> = Vec::new();
    for text in texts {
        let destination: Destination =
            text.parse().map_err(|why: String| refuse("upload", redacted(text), why))?;
        if destinations.iter().any(|known| known.name() == destination.name()) {
            return Err(refuse("upload", redacted(text), "given twice; accepted: each backend once"));
        }
        destinations.push(destination);
    }
    Ok(destinations)
}

/// What may be shown of an upload's text, which need not be a URL: nothing that could be credentials or a query.
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
const SAMPLE_LABELS: [&str; 3] = ["comm", "pid", "thread_name"];

/// Source: Prometheus data model, label names; two leading underscores are for internal use.
fn is_label_name(name: &str) -> bool {
    push::is_label_name(name) && !name.starts_with("__")
}

/// Rules of flags come before those of the file, and the first that matches decides.
fn parse_heap(file: &[HeapRule], flags: &[String]) -> Result<Vec<heap::Rule>, ConfigError> {
    let file = file.iter().map(|rule| match &rule.rate {
        Some(rate) => format!("{}@{rate}", rule.matches),
        None => rule.matches.clone(),
    });
    let accepted = "accepted: NAME=VALUE or NAME=VALUE@RATE, NAME a label or pid, RATE in bytes, KiB or MiB, below 4 GiB";
    let rule = |text: String| heap::parse(&text).ok_or_else(|| refuse("heap", &text, accepted));
    flags.iter().cloned().chain(file).map(rule).collect()
}

fn parse_unwind(value: Option<String>) -> Result<Unwind, ConfigError> {
    match value.as_deref() {
        None | Some("dwarf") => Ok(Unwind::Dwarf),
        Some("frame-pointers") => Ok(Unwind::FramePointers),
        Some(other) => Err(refuse("unwind", other, "accepted: dwarf, frame-pointers")),
    }
}

fn parse_log_format(value: Option<String>) -> Result<LogFormat, ConfigError> {
    match value.as_deref() {
        None | Some("text") => Ok(LogFormat::Text),
        Some("json") => Ok(LogFormat::Json),
        Some(other) => Err(refuse("log-format", other, "accepted: text, json")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(args: &[&str], file: &str) -> Result<Config, ConfigError> {
        let flags =
            Flags::try_parse_from([&["profiler-agent"], args].concat()).expect("flags that clap knows");
        merge(flags, parse_file(file).map_err(|why| refuse("config", "file", why))?)
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
        assert_eq!(config.window, Duration::from_secs(10));
        assert_eq!(config.listen.to_string(), "127.0.0.1:7701");
        assert_eq!(config.backend_listen.to_string(), "127.0.0.1:7700");
        assert_eq!(config.data_dir, Path::new("/var/lib/profiler"));
        assert_eq!(config.unwind, Unwind::Dwarf);
        assert_eq!(config.uploads, []);
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
    fn bad_values_are_refused_with_what_is_accepted() {
        refused(&["-F", "0"], "", &["frequency", "\"0\"", "1 to 1000"]);
        refused(&["-F", "1001"], "", &["frequency", "1001"]);
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
    fn a_file_that_is_not_there_is_refused_by_name() {
        let flags = Flags { config: Some("/nowhere/x.toml".into()), ..Flags::default() };
        let error = load(flags).expect_err("refused").to_string();
        assert!(error.contains("/nowhere/x.toml"), "{error}");
    }
}
