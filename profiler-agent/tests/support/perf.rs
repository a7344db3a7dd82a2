//! `perf record` beside the agent: the same processes at the same time, unwound by others.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::support::{interrupt, run};

/// How perf finds callers.
#[derive(Clone, Copy, Debug)]
pub enum CallGraph {
    FramePointers,
    /// By call frame information, over a copy of this many bytes of stack a sample.
    Dwarf(u32),
}

/// A frame of the user stack. Addresses are as the ELF file states them, where there is one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    pub address: u64,
    /// `None` where perf knows none.
    pub symbol: Option<String>,
    /// Name of the file without its folders.
    pub file: String,
}

/// User stacks of each process, leaf first.
pub type Stacks = HashMap<u32, Vec<Vec<Frame>>>;

/// A running perf record.
pub struct Recording {
    child: Child,
    data: PathBuf,
}

impl Recording {
    /// Starts it on all threads of some processes; `None` where perf is not installed.
    pub fn start(pids: &[u32], call_graph: CallGraph, hz: u32, data: &Path) -> Option<Self> {
        let pids = pids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let call_graph = match call_graph {
            CallGraph::FramePointers => "fp".to_owned(),
            CallGraph::Dwarf(bytes) => format!("dwarf,{bytes}"),
        };
        let mut perf = Command::new("perf");
        perf.args(["record", "-q", "-e", "cpu-clock", "-F", &hz.to_string(), "--call-graph", &call_graph]);
        perf.args(["-p", &pids, "-o"]).arg(data);
        perf.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Some(Self { child: perf.spawn().ok()?, data: data.to_owned() })
    }

    /// Ends it and reads what it recorded.
    pub fn finish(mut self) -> Stacks {
        interrupt(&self.child);
        // Interrupted, it ends by the same signal.
        self.child.wait().expect("a child of this test");
        let data = self.data.to_str().expect("a plain path");
        // Inlined calls are no frames of the stack.
        parse(&run("perf", &["script", "--no-inline", "-F", "pid,ip,sym,dso", "-i", data]))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A line with the pid, then one for each frame, then an empty one.
fn parse(script: &str) -> Stacks {
    let mut stacks = Stacks::new();
    for sample in script.split("\n\n") {
        let mut lines = sample.lines().filter(|line| !line.trim().is_empty());
        let Some(pid) = lines.next().and_then(|line| line.trim().parse().ok()) else { continue };
        let frames = lines.filter_map(frame).filter(|frame| !is_kernel(frame));
        stacks.entry(pid).or_default().push(frames.collect());
    }
    stacks
}

/// `   3f9c0 msort_with_tmp.part.0 (/usr/lib/x86_64-linux-gnu/libc.so.6)`
fn frame(line: &str) -> Option<Frame> {
    let (address, rest) = line.trim().split_once(' ')?;
    let (symbol, file) = rest.rsplit_once(" (")?;
    let file = file.trim_end_matches(')').trim_end_matches(" (deleted");
    let file = file.rsplit('/').next()?.to_owned();
    let symbol = (symbol != "[unknown]").then(|| symbol.to_owned());
    Some(Frame { address: u64::from_str_radix(address, 16).ok()?, symbol, file })
}

fn is_kernel(frame: &Frame) -> bool {
    // libunwind's mark of a chain that breaks off is kept: it is no kernel address.
    frame.address >> 63 == 1 && frame.address != u64::MAX
}
