//! `cargo xtask bench unwind`: what a stack costs in the kernel by its depth, and what tables cost to make and to keep.

use std::{
    collections::HashSet,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use profiler_unwind::{UnwindError, UnwindTable, from_elf};
use serde::{Deserialize, Serialize};

use super::{
    load::{self, Running},
    proc::{self, BpfStats, SampleRuns},
    profiler, report,
};
use crate::{command, project};

/// Frames of the sampled stacks.
const DEPTHS: [u32; 3] = [10, 30, 100];

/// Samples per second and CPU: so few that a look at the counters nearly always finds one new run at most.
const SAMPLE_HZ: u32 = 199;

/// Time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_micros(500);

/// What was measured.
#[derive(Serialize)]
struct Measured {
    format_version: u32,
    machine: report::Machine,
    stacks: Vec<StackCost>,
    tables: TableCost,
    names: NameCost,
}

/// The test of the agent that measures it, and what it puts before its numbers.
const NAME_TEST: &str = "symbolize::native::tests::measure_a_warm_address";
const NAME_LINE: &str = "MEASURED ";

/// CPU time of naming an address of a file that is loaded, for the first time: what is asked for again is remembered.
#[derive(Serialize, Deserialize)]
struct NameCost {
    /// By DWARF: functions, inlined calls, files and lines.
    with_lines_ns: u64,
    /// By the symbol table alone.
    by_symbols_ns: u64,
}

/// Time in the sampling program for stacks of one depth, kernel stack and ring buffer included.
#[derive(Serialize)]
struct StackCost {
    frames: u32,
    samples: usize,
    p50_ns: u64,
    p99_ns: u64,
    mean_ns: u64,
}

/// Tables of all shared libraries of the host, made on one thread.
#[derive(Default, Serialize)]
struct TableCost {
    files: u64,
    rows: u64,
    raw_rows: u64,
    bytes: u64,
    /// CPU time of making them, by the scheduler's account, whose steps of a tick even out over the files. Reading the
    /// files is not in it.
    seconds: f64,
    refused: u64,
}

pub(super) fn run(seconds: u64, work: &Path) -> Result<String> {
    let machine = report::Machine::read()?;
    let tables = convert_all(Path::new("/usr/lib"));
    let stacks = sample_stacks(Duration::from_secs(seconds), work)?;
    let names = name_addresses()?;
    let measured = Measured { format_version: 2, machine, stacks, tables, names };
    print!("{}", markdown(&measured));
    serde_json::to_string_pretty(&measured).context("write JSON")
}

fn name_addresses() -> Result<NameCost> {
    let mut cargo = command::cargo();
    cargo.args(["test", "--release", "--package", "profiler-agent", "--bin", "profiler-agent", "--"]);
    let said = command::output(cargo.args(["--ignored", "--nocapture", "--exact", NAME_TEST]))?;
    let line = said.lines().find_map(|line| line.strip_prefix(NAME_LINE));
    serde_json::from_str(line.context("the test has measured nothing")?).context("read what it measured")
}

fn sample_stacks(duration: Duration, work: &Path) -> Result<Vec<StackCost>> {
    let _counting = BpfStats::enable()?;
    let address = load::free_address()?;
    let mut command = load::own_program("profiler-agent");
    command.args(["--frequency", &SAMPLE_HZ.to_string(), "--cpu-budget", "off"]);
    command.args(["--listen", &address.to_string(), "--backend-listen", "127.0.0.1:0"]);
    command.arg("--data-dir").arg(work.join("unwind-store")).arg("--run-dir").arg(work.join("unwind-run"));
    let mut agent = Running::start(command.stderr(load::log(work, "agent-unwind.log")?))?;
    wait_for_tables(&mut agent, address)?;
    let costs = DEPTHS.iter().map(|&frames| sample_depth(frames, duration, &agent));
    let costs = costs.collect::<Result<_>>();
    agent.interrupt()?;
    costs
}

/// The processes that run have their tables.
fn wait_for_tables(agent: &mut Running, address: std::net::SocketAddr) -> Result<()> {
    let end = Instant::now() + load::PATIENCE;
    loop {
        agent.check().context("the agent")?;
        let metrics = profiler::get(address, "/metrics").unwrap_or_default();
        if metrics.lines().any(|line| line == "profiler_agent_unwind_scanned 1") {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the agent has no tables");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Every CPU runs a program whose stacks are so deep; single runs of the sampling program are told by looking at its
/// counters more often than it runs.
fn sample_depth(frames: u32, duration: Duration, agent: &Running) -> Result<StackCost> {
    let cpus = thread::available_parallelism().context("count the CPUs")?.get();
    let start = |_| {
        let mut program = Command::new(project::target().join("testprogs/depth"));
        program.arg(frames.to_string()).stdin(Stdio::piped()).stdout(Stdio::null());
        Running::start(&mut program)
    };
    let _programs = (0..cpus).map(start).collect::<Result<Vec<_>>>()?;
    // Their first samples ask for their tables.
    thread::sleep(Duration::from_secs(2));
    let runs = SampleRuns::of(agent.pid())?;
    let (end, mut before, mut ns) = (Instant::now() + duration, runs.read()?, Vec::new());
    while Instant::now() < end {
        thread::sleep(LOOK_INTERVAL);
        let after = runs.read()?;
        if after.runs == before.runs + 1 {
            ns.push(after.ns - before.ns);
        }
        before = after;
    }
    ensure!(!ns.is_empty(), "no sample in {duration:?}");
    ns.sort_unstable();
    let at = |percent: usize| ns[(ns.len() - 1) * percent / 100];
    let mean_ns = ns.iter().sum::<u64>() / ns.len() as u64;
    Ok(StackCost { frames, samples: ns.len(), p50_ns: at(50), p99_ns: at(99), mean_ns })
}

fn convert_all(folder: &Path) -> TableCost {
    let (mut cost, mut seen) = (TableCost::default(), HashSet::new());
    let mut files = Vec::new();
    libraries(folder, &mut files);
    for path in files.iter().filter_map(|path| fs::canonicalize(path).ok()) {
        if seen.insert(path.clone())
            && let Ok(bytes) = fs::read(&path)
        {
            cost.add(&bytes);
        }
    }
    cost
}

impl TableCost {
    fn add(&mut self, bytes: &[u8]) {
        let cpu_ns = || proc::thread_cpu_ns().unwrap_or_default();
        let start_ns = cpu_ns();
        let table = from_elf(bytes);
        let seconds = (cpu_ns() - start_ns) as f64 / 1e9;
        match table {
            Ok(table) => self.add_table(&table, seconds),
            Err(UnwindError::NoUnwindInformation | UnwindError::NoCode | UnwindError::Headers(_)) => {}
            Err(_) => self.refused += 1,
        }
    }

    fn add_table(&mut self, table: &UnwindTable, seconds: f64) {
        self.files += 1;
        self.rows += table.counts().rows;
        self.raw_rows += table.counts().raw_rows;
        self.bytes += table.page_bytes() as u64;
        self.seconds += seconds;
    }

    fn bytes_per_row(&self) -> f64 {
        self.bytes as f64 / self.rows.max(1) as f64
    }
}

/// `*.so` and `*.so.*` below a folder; links to folders are not followed.
fn libraries(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let name = name.to_string_lossy();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => libraries(&path, found),
            Ok(_) if name.ends_with(".so") || name.contains(".so.") => found.push(path),
            _ => {}
        }
    }
}

fn markdown(measured: &Measured) -> String {
    let Measured { format_version: _, machine: _, stacks, tables, names } = measured;
    let mut text = String::from("| frames | samples | p50 | p99 | mean |\n| --- | --- | --- | --- | --- |\n");
    for &StackCost { frames, samples, p50_ns, p99_ns, mean_ns } in stacks {
        let us = |ns: u64| ns as f64 / 1000.0;
        let _ = writeln!(
            text,
            "| {frames} | {samples} | {:.1} µs | {:.1} µs | {:.1} µs |",
            us(p50_ns),
            us(p99_ns),
            us(mean_ns)
        );
    }
    if let [least, .., most] = &stacks[..] {
        let ns = most.p50_ns.saturating_sub(least.p50_ns);
        let _ = writeln!(text, "\nA frame more: {} ns", ns / u64::from(most.frames - least.frames));
    }
    let _ = writeln!(
        text,
        "\n{} shared libraries: {:.2} s of CPU time, {} rows ({:.1} M before merging), {:.1} MiB, {:.2} bytes a row, {} refused",
        tables.files,
        tables.seconds,
        tables.rows,
        tables.raw_rows as f64 / 1e6,
        tables.bytes as f64 / f64::from(1 << 20),
        tables.bytes_per_row(),
        tables.refused
    );
    let _ = writeln!(
        text,
        "\nA warm address: {} ns with lines and inlined calls, {} ns by symbols alone",
        names.with_lines_ns, names.by_symbols_ns
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_files_with_so_in_their_name() {
        let folder = std::env::temp_dir().join(format!("xtask-libraries-{}", std::process::id()));
        fs::create_dir_all(folder.join("below")).expect("a folder");
        for name in ["liba.so", "below/libb.so.6", "c.so.conf.d.txt", "solo", "d.o"] {
            fs::write(folder.join(name), "").expect("a file");
        }
        let mut found = Vec::new();
        libraries(&folder, &mut found);
        fs::remove_dir_all(&folder).expect("it was made here");
        found.sort();
        // One that only looks like a library costs a look at its first bytes.
        let names: Vec<_> = found.iter().filter_map(|path| path.file_name()?.to_str()).collect();
        assert_eq!(names, ["libb.so.6", "c.so.conf.d.txt", "liba.so"]);
    }

    #[test]
    fn a_file_that_is_no_library_costs_nothing() {
        let mut cost = TableCost::default();
        cost.add(b"INPUT(-lncurses)");
        assert_eq!((cost.files, cost.refused), (0, 0));
    }
}
