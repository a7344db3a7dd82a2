//! The profilers that are compared, and how each is asked what it did.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::load::{self, Backend, Running};
use crate::command;

/// A profiler under measurement. Times are seconds since boot.
pub(super) enum Started {
    Agent { process: Running, address: SocketAddr },
    Perf { process: Running, recording: PathBuf },
}

/// What a profiler did between two moments.
pub(super) struct Work {
    pub(super) samples: f64,
    /// Samples it knows that it lost.
    pub(super) lost: Option<f64>,
    /// Uploaded by the agent, written by perf.
    pub(super) bytes_out: f64,
    /// When it took its first sample, if that is only known in the end.
    pub(super) first_sample_s: Option<f64>,
}

/// The agent's counters.
#[derive(Clone, Copy)]
pub(super) struct Counters {
    samples: f64,
    lost: f64,
    bytes_out: f64,
}

impl Started {
    pub(super) fn agent(hz: u32, backend: &Backend, work: &Path) -> Result<Self> {
        let address = load::free_address()?;
        let mut command = load::own_program("profiler-agent");
        command.args(["--frequency", &hz.to_string(), "--listen", &address.to_string()]);
        command.args(["--upload", &format!("http://{}", backend.address)]);
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

    pub(super) fn process(&mut self) -> &mut Running {
        match self {
            Self::Agent { process, .. } | Self::Perf { process, .. } => process,
        }
    }

    /// The counters so far, of a profiler that can be asked while it runs and answers already.
    pub(super) fn counters(&self) -> Option<Counters> {
        match self {
            Self::Agent { address, .. } => counters(*address).ok(),
            Self::Perf { .. } => None,
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
                Ok(agent_work(before, after))
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

fn agent_work(before: Counters, after: Counters) -> Work {
    Work {
        samples: after.samples - before.samples,
        lost: Some(after.lost - before.lost),
        bytes_out: after.bytes_out - before.bytes_out,
        first_sample_s: None,
    }
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
    })
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
}
