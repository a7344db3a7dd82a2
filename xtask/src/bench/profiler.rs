//! The profilers that are compared, and how each is asked what it did.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use super::load::{self, Backend, Running};
use crate::command;

/// A profiler under measurement. Times are seconds since boot.
pub(super) enum Started {
    Agent { process: Running, address: SocketAddr },
    Perf { process: Running, recording: PathBuf },
    Bpftrace { process: Running, output: PathBuf },
}

/// What people write to see where time goes: stacks of every process, counted, named when they are printed.
///
/// `first` and `at` lines say when: `nsecs` counts from boot, as `/proc/uptime` does.
const BPFTRACE_SCRIPT: &str = "
profile:hz:HZ /pid/ {
  if (@first == 0) { @first = 1; printf(\"first %llu\\n\", nsecs); }
  @taken = count();
  @stacks[pid, comm, ustack, kstack] = count();
}
interval:s:10 { printf(\"at %llu \", nsecs); print(@taken); print(@stacks); clear(@stacks); }
";

/// What a profiler did between two moments.
pub(super) struct Work {
    pub(super) samples: f64,
    /// Samples it knows that it lost.
    pub(super) lost: Option<f64>,
    /// Uploaded by the agent, written by the others.
    pub(super) bytes_out: f64,
    pub(super) sample_times: Option<SampleTimes>,
    /// When it took its first sample, if that is only known in the end.
    pub(super) first_sample_s: Option<f64>,
}

/// Time in the kernel of the samples that were timed, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct SampleTimes {
    pub(super) timed: f64,
    pub(super) p50_ns: f64,
    pub(super) p99_ns: f64,
}

/// The agent's counters.
#[derive(Clone)]
pub(super) struct Counters {
    samples: f64,
    lost: f64,
    bytes_out: f64,
    /// Samples that took no longer than so many seconds, by rising bounds.
    sample_times: Vec<(f64, f64)>,
}

impl Started {
    pub(super) fn agent(hz: u32, backend: &Backend, work: &Path) -> Result<Self> {
        let address = load::free_address()?;
        let mut command = load::own_program("profiler-agent");
        command.args(["--frequency", &hz.to_string(), "--listen", &address.to_string()]);
        command.args(["--upload", &format!("http://{}", backend.address)]);
        // What an earlier case has learnt would make this one cheaper.
        let cache = work.join("cache");
        if cache.exists() {
            fs::remove_dir_all(&cache).with_context(|| format!("remove {}", cache.display()))?;
        }
        command.arg("--cache-dir").arg(cache);
        let process = Running::start(command.stderr(load::log(work, &format!("agent-{hz}.log"))?))?;
        Ok(Self::Agent { process, address })
    }

    pub(super) fn perf(hz: u32, work: &Path) -> Result<Self> {
        let recording = work.join(format!("perf-{hz}.data"));
        let mut command = Command::new("perf");
        // The agent's event, and time stamps that compare with /proc/uptime.
        command.args([
            "record",
            "-a",
            "-g",
            "-e",
            "cpu-clock",
            "-F",
            &hz.to_string(),
            "-k",
            "boottime",
            "-o",
        ]);
        command.arg(&recording).stdin(Stdio::null()).stdout(Stdio::null());
        let process = Running::start(command.stderr(load::log(work, &format!("perf-{hz}.log"))?))?;
        Ok(Self::Perf { process, recording })
    }

    pub(super) fn bpftrace(hz: u32, work: &Path) -> Result<Self> {
        let output = work.join(format!("bpftrace-{hz}.txt"));
        let mut command = Command::new("bpftrace");
        command.args(["-B", "line", "-o"]).arg(&output);
        command.args(["-e", &BPFTRACE_SCRIPT.replace("HZ", &hz.to_string())]);
        // Else it reads the symbols of every process anew each time it prints, and takes twice as much.
        command.env("BPFTRACE_CACHE_USER_SYMBOLS", "1");
        let process = Running::start(
            command.stdin(Stdio::null()).stderr(load::log(work, &format!("bpftrace-{hz}.log"))?),
        )?;
        Ok(Self::Bpftrace { process, output })
    }

    pub(super) fn process(&mut self) -> &mut Running {
        match self {
            Self::Agent { process, .. } | Self::Perf { process, .. } | Self::Bpftrace { process, .. } => {
                process
            }
        }
    }

    /// [`Self::counters`], asked for until there is an answer, of a profiler that can be asked.
    pub(super) fn wait_for_counters(&self) -> Option<Counters> {
        let end = Instant::now() + load::PATIENCE;
        let is_asked = matches!(self, Self::Agent { .. });
        loop {
            let counters = self.counters();
            if counters.is_some() || !is_asked || Instant::now() > end {
                return counters;
            }
        }
    }

    /// The counters so far, of a profiler that can be asked while it runs and answers already.
    pub(super) fn counters(&self) -> Option<Counters> {
        match self {
            Self::Agent { address, .. } => counters(*address).ok(),
            Self::Perf { .. } | Self::Bpftrace { .. } => None,
        }
    }

    /// Ends the profiler and tells what it did between `from_s` and `to_s`, or between the counters then.
    pub(super) fn finish(
        self,
        counters: Option<(Counters, Counters)>,
        from_s: f64,
        to_s: f64,
    ) -> Result<Work> {
        match self {
            Self::Agent { process, .. } => {
                process.interrupt().context("stop the agent")?;
                let (before, after) = counters.context("the agent did not answer")?;
                Ok(agent_work(&before, &after))
            }
            Self::Bpftrace { process, output } => {
                // Asked to end it would name all stacks once more, for minutes where it is behind.
                drop(process);
                let text = fs::read(&output).with_context(|| format!("read {}", output.display()))?;
                bpftrace_work(&String::from_utf8_lossy(&text), from_s, to_s)
            }
            Self::Perf { process, recording } => {
                process.interrupt().context("stop perf")?;
                perf_work(&recording, from_s, to_s)
            }
        }
    }
}

impl Counters {
    pub(super) fn has_samples(&self) -> bool {
        self.samples > 0.0
    }
}

fn agent_work(before: &Counters, after: &Counters) -> Work {
    let bounds = after.sample_times.iter().zip(&before.sample_times);
    let times: Vec<(f64, f64)> = bounds.map(|((le, after), (_, before))| (*le, after - before)).collect();
    Work {
        samples: after.samples - before.samples,
        lost: Some(after.lost - before.lost),
        bytes_out: after.bytes_out - before.bytes_out,
        sample_times: SampleTimes::of(&times),
        first_sample_s: None,
    }
}

impl SampleTimes {
    /// Takes samples up to each bound in seconds. `None` without a timed sample.
    fn of(up_to: &[(f64, f64)]) -> Option<Self> {
        let timed = up_to.last()?.1;
        (timed > 0.0).then(|| Self {
            timed,
            p50_ns: quantile(up_to, 0.5 * timed) * 1e9,
            p99_ns: quantile(up_to, 0.99 * timed) * 1e9,
        })
    }
}

/// The time that so many samples did not exceed: evenly spread within a bucket, the last bound beyond all of them.
fn quantile(up_to: &[(f64, f64)], samples: f64) -> f64 {
    let (mut low_s, mut below) = (0.0, 0.0);
    for &(le_s, count) in up_to.iter().filter(|(le_s, _)| le_s.is_finite()) {
        if count >= samples {
            return low_s + (le_s - low_s) * (samples - below) / (count - below);
        }
        (low_s, below) = (le_s, count);
    }
    low_s
}

/// What `bpftrace` says of itself; bytes are the output's, by the share of its samples that are in the interval.
fn bpftrace_work(output: &str, from_s: f64, to_s: f64) -> Result<Work> {
    let seconds = |ns: &str| ns.parse::<f64>().ok().map(|ns| ns / 1e9);
    let first = output.lines().find_map(|line| seconds(line.strip_prefix("first ")?));
    let readings: Vec<(f64, f64)> = output.lines().filter_map(taken_at).collect();
    let (Some(first_s), Some(last)) = (first, readings.last()) else {
        bail!("bpftrace printed nothing by second {to_s}");
    };
    // Where it is behind, or the interval short, the rate is that of its whole life.
    let inside: Vec<_> = readings.iter().filter(|(at_s, _)| (from_s..to_s).contains(at_s)).collect();
    let life = (&(first_s, 0.0), last);
    let (begin, end) = match (inside.first(), inside.last()) {
        (Some(begin), Some(end)) if begin.0 < end.0 => (*begin, *end),
        _ => life,
    };
    let samples = (end.1 - begin.1) / (end.0 - begin.0) * (to_s - from_s);
    Ok(Work {
        samples,
        lost: None,
        bytes_out: output.len() as f64 * samples / last.1,
        sample_times: None,
        first_sample_s: Some(first_s),
    })
}

/// `at 810196729350 @taken: 188`: seconds since boot, and samples by then.
fn taken_at(line: &str) -> Option<(f64, f64)> {
    let (at_ns, taken) = line.strip_prefix("at ")?.split_once(" @taken: ")?;
    Some((at_ns.parse::<f64>().ok()? / 1e9, taken.trim().parse().ok()?))
}

/// Bytes are the recording's, by the share of its samples that are in the interval.
fn perf_work(recording: &Path, from_s: f64, to_s: f64) -> Result<Work> {
    let mut script = Command::new("perf");
    script.args(["script", "-F", "time", "-G", "-i"]).arg(recording).stdin(Stdio::null());
    let times = sample_times(&command::output(&mut script)?);
    let first_sample_s = times.iter().copied().reduce(f64::min).context("perf recorded no sample")?;
    let samples = times.iter().filter(|time| (from_s..to_s).contains(*time)).count() as f64;
    let bytes = fs::metadata(recording).context("read the recording's size")?.len() as f64;
    Ok(Work {
        samples,
        lost: None,
        bytes_out: bytes * samples / times.len() as f64,
        sample_times: None,
        first_sample_s: Some(first_sample_s),
    })
}

/// `  1234.567890:`, one a line.
fn sample_times(script: &str) -> Vec<f64> {
    script.lines().filter_map(|line| line.trim().strip_suffix(':')?.parse().ok()).collect()
}

fn counters(address: SocketAddr) -> Result<Counters> {
    let text = get(address, "/metrics")?;
    Ok(Counters {
        samples: metric(&text, "profiler_agent_samples_taken_total"),
        lost: metric(&text, "profiler_agent_samples_dropped_total"),
        bytes_out: metric(&text, "profiler_agent_upload_bytes_total"),
        sample_times: buckets(&text, "profiler_agent_bpf_sample_seconds"),
    })
}

/// The bounds of a histogram without further labels, and its samples up to each.
fn buckets(text: &str, name: &str) -> Vec<(f64, f64)> {
    let bucket = |line: &str| {
        let (le, count) = line.strip_prefix(name)?.strip_prefix("_bucket{le=\"")?.split_once("\"} ")?;
        Some((le.parse().ok()?, count.parse().ok()?))
    };
    text.lines().filter_map(bucket).collect()
}

/// The metric's value, added up over its labels.
fn metric(text: &str, name: &str) -> f64 {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        rest.starts_with(['{', ' ']).then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
    });
    values.sum()
}

/// The body of a successful answer.
pub(super) fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(|| format!("read {path} from {address}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    if !head.starts_with("HTTP/1.1 200 ") {
        bail!("{path}: {}", head.lines().next().unwrap_or_default());
    }
    Ok(body.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_summed_over_its_labels_and_no_other_name_is_taken_for_it() {
        let text =
            "# TYPE x_total counter\nx_total{a=\"b c\"} 2\nx_total{a=\"d\"} 3\nx_total_more 9\ny 1.5\n";
        assert_eq!(metric(text, "x_total"), 5.0);
        assert_eq!(metric(text, "y"), 1.5);
        assert_eq!(metric(text, "z"), 0.0);
    }

    #[test]
    fn every_line_with_a_time_is_a_sample() {
        assert_eq!(sample_times("  12.500000: \n\n 13.000001:\n\tffff main\n"), [12.5, 13.000001]);
    }

    #[test]
    fn quantiles_lie_within_the_bucket_that_holds_them() {
        let text =
            "x_bucket{le=\"0.001\"} 10\nx_bucket{le=\"0.002\"} 30\nx_bucket{le=\"+Inf\"} 40\nx_sum 9\n";
        let up_to = buckets(text, "x");
        assert_eq!(up_to, [(0.001, 10.0), (0.002, 30.0), (f64::INFINITY, 40.0)]);
        let SampleTimes { timed, p50_ns, p99_ns } = SampleTimes::of(&up_to).expect("some were timed");
        assert_eq!((timed, p50_ns.round(), p99_ns.round()), (40.0, 1_500_000.0, 2_000_000.0));
        assert_eq!(SampleTimes::of(&[(0.001, 0.0), (f64::INFINITY, 0.0)]), None);
    }

    #[test]
    fn bpftrace_tells_its_samples_by_time() {
        let output = "Attaching 2 probes...\nfirst 9000000000\nat 10000000000 @taken: 10\n@stacks[1, a]: 1\n\
                      at 20000000000 @taken: 30\nat 30000000000 @taken: 60\nat 40000000000 @taken: 80\n";
        let work = bpftrace_work(output, 15.0, 35.0).expect("two readings");
        assert_eq!((work.first_sample_s, work.samples), (Some(9.0), 60.0));
        assert_eq!(work.bytes_out, output.len() as f64 * 60.0 / 80.0);
        let behind = bpftrace_work(output, 35.0, 45.0).expect("what it has printed before");
        assert_eq!(behind.samples, (80.0 / 31.0) * 10.0);
        assert!(bpftrace_work("Attaching 2 probes...\n", 35.0, 45.0).is_err());
    }
}
