//! `cargo xtask bench heap`: what profiling the heap costs the program that is profiled, beside heaptrack and bpftrace, in
//! one run.
//!
//! The program does a million pairs of malloc and free a second of its own CPU time; each case runs it for the same CPU time,
//! and what it gets done less is its slowdown. Cases take turns, every second round in reverse.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::{
    load::{self, Backend, PATIENCE, Running},
    profiler,
};
use crate::{
    command, project,
    tools::{self, BPFTRACE, HEAPTRACK},
};

/// Pairs a second of CPU time that the program does when nobody looks.
const PAIRS_PER_S: f64 = 1e6;
const PROGRAM: &str = "heap_pairs";
/// CPU time of the runs that find out how much work lies between two allocations.
const CALIBRATION: Duration = Duration::from_secs(1);

/// Who profiles the program's heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Case {
    Nobody,
    /// The control: what differs from [`Self::Nobody`] is noise.
    NobodyAgain,
    /// Without a budget.
    Agent,
    /// With the default budget.
    AgentBudget,
    Heaptrack,
    Bpftrace,
}

impl Case {
    const ALL: [Self; 6] =
        [Self::Nobody, Self::Agent, Self::AgentBudget, Self::Heaptrack, Self::Bpftrace, Self::NobodyAgain];

    fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody (A)",
            Self::NobodyAgain => "nobody again (A/A)",
            Self::Agent => "agent, no budget",
            Self::AgentBudget => "agent, default budget",
            Self::Heaptrack => "heaptrack",
            Self::Bpftrace => "bpftrace",
        }
    }

    /// Why it cannot be measured here; `None` where it can.
    fn lack(self) -> Option<&'static str> {
        match self {
            Self::Heaptrack if !command::is_installed("heaptrack") => Some("heaptrack is not installed"),
            Self::Bpftrace if !command::is_installed("bpftrace") => Some("bpftrace is not installed"),
            _ => None,
        }
    }
}

/// What the numbers depend on.
#[derive(Serialize)]
struct Machine {
    kernel: String,
    cpus: usize,
    /// Other work on the machine, before the first case: 1, 5 and 15 minutes.
    load_average: String,
}

impl Machine {
    fn read() -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpus: thread::available_parallelism().context("count the CPUs")?.get(),
            load_average: read("/proc/loadavg")?.split(' ').take(3).collect::<Vec<_>>().join(" "),
        })
    }
}

/// What the program did in its CPU time.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Work {
    pairs: u64,
    /// With the work behind each allocation.
    malloc_ns: u64,
    free_ns: u64,
}

impl Work {
    fn of_malloc(self) -> f64 {
        self.malloc_ns as f64 / self.pairs as f64
    }

    fn of_free(self) -> f64 {
        self.free_ns as f64 / self.pairs as f64
    }

    fn of_pair(self) -> f64 {
        self.of_malloc() + self.of_free()
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug, Serialize)]
struct Run {
    case: Case,
    #[serde(flatten)]
    work: Work,
}

/// Measures every case for `measured` of the program's CPU time, `rounds` times. Gives the raw numbers.
pub(super) fn run(measured: Duration, rounds: u32, work: &Path) -> Result<String> {
    tools::want(&[HEAPTRACK, BPFTRACE]);
    let machine = Machine::read()?;
    let backend = Backend::start(work)?;
    let cases = Case::ALL.into_iter().filter(|case| match case.lack() {
        None => true,
        Some(lack) => {
            eprintln!("SKIP {}: {lack}", case.name());
            false
        }
    });
    let cases: Vec<Case> = cases.collect();
    let steps = calibrate()?;
    let bench = Bench { measured, steps, backend: &backend, work };
    let mut runs = Vec::new();
    for round in 0..rounds {
        let mut order = cases.clone();
        if round % 2 == 1 {
            order.reverse();
        }
        for case in order {
            eprintln!("round {} of {rounds}: {}", round + 1, case.name());
            runs.push(Run { case, work: bench.measure(case).with_context(|| case.name())? });
        }
    }
    print!("{}", markdown(&machine, measured, rounds, &runs));
    let json = serde_json::json!({ "format_version": 1, "machine": machine, "work": steps, "runs": runs });
    serde_json::to_string_pretty(&json).context("write JSON")
}

/// Steps of work behind each allocation, so that nobody's program does [`PAIRS_PER_S`].
fn calibrate() -> Result<u64> {
    let pair_ns =
        |steps: u64| Ok::<_, anyhow::Error>(Program::start(CALIBRATION, steps, None)?.go()?.of_pair());
    let (few, many) = (100, 1100);
    let (few_ns, many_ns) = (pair_ns(few)?, pair_ns(many)?);
    let step_ns = (many_ns - few_ns) / (many - few) as f64;
    if step_ns <= 0.0 {
        bail!("more work takes less time: {few_ns:.0} and {many_ns:.0} ns");
    }
    Ok((few as f64 + (1e9 / PAIRS_PER_S - few_ns) / step_ns).round() as u64)
}

struct Bench<'a> {
    measured: Duration,
    steps: u64,
    backend: &'a Backend,
    work: &'a Path,
}

impl Bench<'_> {
    fn measure(&self, case: Case) -> Result<Work> {
        match case {
            Case::Nobody | Case::NobodyAgain => self.program()?.go(),
            Case::Agent => self.under_agent(&["--heap-budget", "off"]),
            Case::AgentBudget => self.under_agent(&[]),
            Case::Heaptrack => {
                let wrapper = ["heaptrack".into(), "--output".into(), self.work.join("heaptrack")];
                Program::start(self.measured, self.steps, Some(&wrapper))?.go()
            }
            Case::Bpftrace => self.under_bpftrace(),
        }
    }

    fn program(&self) -> Result<Program> {
        Program::start(self.measured, self.steps, None)
    }

    fn under_agent(&self, arguments: &[&str]) -> Result<Work> {
        let address = load::free_address()?;
        let mut agent = load::own_program("profiler-agent");
        agent.args([
            "--listen",
            &address.to_string(),
            "--upload",
            &format!("http://{}", self.backend.address),
        ]);
        agent
            .args(["--heap", &format!("exe={PROGRAM}"), "--run-dir"])
            .arg(self.work.join("run"))
            .args(arguments);
        let mut agent = Running::start(agent.stderr(load::log(self.work, "agent-heap.log")?))?;
        wait_for("the agent answers", || Ok(profiler::get(address, "/readyz").is_ok()))?;
        let program = self.program()?;
        wait_for("the agent profiles the program", || {
            agent.check().context("the agent")?;
            let metrics = profiler::get(address, "/metrics").unwrap_or_default();
            Ok(metrics.contains("\nprofiler_agent_heap_targets 1\n"))
        })?;
        let work = program.go()?;
        agent.interrupt().context("stop the agent")?;
        Ok(work)
    }

    /// Sizes by address, as tools that look for leaks keep them.
    fn under_bpftrace(&self) -> Result<Work> {
        let program = self.program()?;
        let (pid, library) = (program.child.id(), program.c_library()?);
        let library = library.display();
        let script = format!(
            "uprobe:{library}:malloc /pid == {pid}/ {{ @size[tid] = arg0; }} \
             uretprobe:{library}:malloc /pid == {pid} && @size[tid]/ {{ @bytes[retval] = @size[tid]; delete(@size[tid]); }} \
             uprobe:{library}:free /pid == {pid}/ {{ delete(@bytes[arg0]); }}"
        );
        let before = program.code()?;
        let mut bpftrace = Command::new("bpftrace");
        bpftrace.args(["-p", &pid.to_string(), "-e", &script]).stdin(Stdio::null()).stdout(Stdio::null());
        let mut bpftrace = Running::start(bpftrace.stderr(load::log(self.work, "bpftrace.log")?))?;
        wait_for("bpftrace has attached", || {
            bpftrace.check().context("bpftrace")?;
            Ok(program.code()? != before)
        })?;
        // The three probes are put in one after the other, tens of milliseconds apart.
        thread::sleep(Duration::from_secs(1));
        let work = program.go()?;
        bpftrace.interrupt().context("stop bpftrace")?;
        Ok(work)
    }
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !is_so()? {
        if Instant::now() > end {
            bail!("waited in vain: {what}");
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The program, which waits for its start.
struct Program {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn start(cpu_time: Duration, steps: u64, wrapper: Option<&[PathBuf]>) -> Result<Self> {
        let program = project::target().join("testprogs").join(PROGRAM);
        let words = wrapper.unwrap_or_default().iter().chain([&program]).collect::<Vec<_>>();
        let (first, rest) = words.split_first().context("a program")?;
        let mut start = Command::new(first);
        start.args(rest).args([cpu_time.as_millis().to_string(), steps.to_string()]);
        let mut child = start
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("start {}", first.display()))?;
        let output = BufReader::new(child.stdout.take().context("its output")?);
        let mut program = Self { child, output };
        program.line_until(|line| line == "ready")?;
        Ok(program)
    }

    /// Runs it, ends it, and gives what it says.
    fn go(mut self) -> Result<Work> {
        let mut input = self.child.stdin.take().context("its input")?;
        writeln!(input, "go").context("tell it to begin")?;
        let line = self.line_until(|line| line.starts_with('{'))?;
        drop(input);
        self.child.wait().context("wait for it")?;
        serde_json::from_str(&line).with_context(|| format!("read {line:?}"))
    }

    /// What a wrapper prints goes before.
    fn line_until(&mut self, is_wanted: impl Fn(&str) -> bool) -> Result<String> {
        for line in self.output.by_ref().lines() {
            let line = line.context("read its output")?;
            if is_wanted(&line) {
                return Ok(line);
            }
        }
        bail!("it ended early")
    }

    fn maps(&self) -> Result<String> {
        fs::read_to_string(format!("/proc/{}/maps", self.child.id())).context("read its mappings")
    }

    fn c_library(&self) -> Result<PathBuf> {
        let maps = self.maps()?;
        let path = maps
            .lines()
            .filter_map(|line| line.split_whitespace().nth(5))
            .find(|path| path.contains("libc.so"));
        path.map(PathBuf::from).context("it has no C library")
    }

    /// The code of its C library, in which probes are breakpoints.
    fn code(&self) -> Result<Vec<u8>> {
        use std::os::unix::fs::FileExt as _;
        let maps = self.maps()?;
        let line = maps.lines().find(|line| line.contains("r-xp") && line.contains("libc.so"));
        let range = line.and_then(|line| line.split(' ').next()?.split_once('-')).context("no code")?;
        let hex = |text| u64::from_str_radix(text, 16).context("an address");
        let (start, end) = (hex(range.0)?, hex(range.1)?);
        let mut code = vec![0; usize::try_from(end - start)?];
        let memory = fs::File::open(format!("/proc/{}/mem", self.child.id())).context("open its memory")?;
        memory.read_exact_at(&mut code, start).context("read its code")?;
        Ok(code)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn markdown(machine: &Machine, measured: Duration, rounds: u32, runs: &[Run]) -> String {
    let mut text = format!(
        "Linux {}, {} CPUs; load average before: {}. {PAIRS_PER_S} pairs of malloc and free of 64 bytes a second of CPU \
         time, {} s of it a case, {rounds} rounds; means.\n\n",
        machine.kernel,
        machine.cpus,
        machine.load_average,
        measured.as_secs_f64()
    );
    text += "| heap profiled by | ns a pair | slowdown, ratio | more ns a malloc | more ns a free |\n";
    text += "| --- | ---: | ---: | ---: | ---: |\n";
    let mean = |case, value: fn(Work) -> f64| mean(runs, case, value);
    let nobody = mean(Case::Nobody, Work::of_pair);
    for case in Case::ALL {
        let Some(pair_ns) = mean(case, Work::of_pair) else { continue };
        let ratio = nobody.map_or(f64::NAN, |nobody| pair_ns / nobody);
        let more = |value| mean(case, value).zip(mean(Case::Nobody, value)).map_or(f64::NAN, |(a, b)| a - b);
        let (malloc, free) = (more(Work::of_malloc), more(Work::of_free));
        let _ = writeln!(text, "| {} | {pair_ns:.0} | {ratio:.3} | {malloc:.0} | {free:.0} |", case.name());
    }
    text
}

fn mean(runs: &[Run], case: Case, value: fn(Work) -> f64) -> Option<f64> {
    let values: Vec<f64> = runs.iter().filter(|run| run.case == case).map(|run| value(run.work)).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slowdown_is_the_ratio_to_nobody() {
        let run = |case, malloc_ns, free_ns| Run { case, work: Work { pairs: 10, malloc_ns, free_ns } };
        let runs = [
            run(Case::Nobody, 9000, 800),
            run(Case::Nobody, 9000, 1200),
            run(Case::Agent, 15_000, 5000),
            run(Case::NobodyAgain, 9000, 1000),
        ];
        assert_eq!(mean(&runs, Case::Nobody, Work::of_pair), Some(1000.0));
        let machine = Machine { kernel: "6".to_owned(), cpus: 2, load_average: "0".to_owned() };
        let text = markdown(&machine, Duration::from_secs(1), 2, &runs);
        assert!(text.contains("| agent, no budget | 2000 | 2.000 | 600 | 400 |"), "{text}");
        assert!(text.contains("| nobody again (A/A) | 1000 | 1.000 | 0 | 0 |"), "{text}");
        assert!(!text.contains("bpftrace"), "{text}");
    }
}
