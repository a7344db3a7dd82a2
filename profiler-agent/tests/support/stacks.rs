//! The agent's stacks, as far as they tell how well it unwinds.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::collections::{BTreeMap, HashMap, HashSet};

use profiler_pprof::{
    FrameKind,
    proto::{Location, Profile},
};

use crate::perf;

/// A function in a file, by the file's name without its folders.
pub type Function = (String, String);

/// Caller and callee.
pub type Edge = (Function, Function);

/// The stacks of one profile.
#[derive(Debug, Default)]
pub struct Stacks {
    /// CPU time, in nanoseconds.
    pub total: i64,
    /// CPU time by outermost frame.
    pub roots: BTreeMap<String, i64>,
    edges: HashSet<Edge>,
    /// What the agent calls an address of a file.
    functions: HashMap<(String, u64), String>,
}

impl Stacks {
    pub fn of(profile: &Profile) -> Self {
        let mut stacks = Self::default();
        // A profile of nothing has no sample types.
        let Some(cpu) = profile.sample_type_index("cpu") else { return stacks };
        for sample in &profile.sample {
            let frames: Vec<&Location> = sample
                .location_id
                .iter()
                .filter_map(|&id| profile.location(id))
                .filter(|location| profile.kind(location) != FrameKind::Kernel)
                .collect();
            let value = sample.value[cpu];
            let root = frames.last().map_or_else(|| "[kernel]".to_owned(), |last| name(profile, last));
            stacks.total += value;
            *stacks.roots.entry(root).or_default() += value;
            for pair in frames.windows(2) {
                stacks.edges.insert((function(profile, pair[1]), function(profile, pair[0])));
            }
            for location in frames {
                let (file, name) = function(profile, location);
                stacks.functions.insert((file, location.address), name);
            }
        }
        stacks
    }

    /// Share of the time whose outermost frame has one of these names, if so much more was taken and lost.
    pub fn share_from(&self, roots: &[&str], lost: i64) -> f64 {
        let found: i64 = roots.iter().filter_map(|&root| self.roots.get(root)).sum();
        found as f64 / (self.total + lost).max(1) as f64
    }

    /// Outermost frames other than these, with their shares, the largest first.
    pub fn other_roots(&self, roots: &[&str]) -> String {
        let mut others: Vec<_> =
            self.roots.iter().filter(|(name, _)| !roots.contains(&name.as_str())).collect();
        others.sort_by_key(|(_, value)| -**value);
        let share = |value: i64| value as f64 * 100.0 / self.total.max(1) as f64;
        let others = others.iter().take(3).map(|(name, value)| format!("{name} {:.2} %", share(**value)));
        others.collect::<Vec<_>>().join(", ")
    }

    /// Of the calls in perf's stacks, how many there are and how many of them the agent has seen; and those it has not.
    ///
    /// One function may have several symbols. Perf's choice is translated where both have seen one address.
    ///
    /// A stack of perf's is compared up to the first frame without call frame information: the call out of that frame still
    /// was found by the callee's, and counts; beyond it perf's unwinder guesses, and its chains skip callers. Such frames are
    /// generated code, which perf cannot name, so that it counts nowhere, and the built-ins of V8. What the agent makes of
    /// them is in the share of stacks that reach the root, and in no comparison.
    pub fn edges_found(&self, of_perf: &[Vec<perf::Frame>]) -> EdgesFound {
        let aliases = self.aliases(of_perf);
        let mut found = EdgesFound::default();
        for stack in of_perf {
            let described = stack.iter().take_while(|frame| is_described(frame)).count();
            let compared = stack.len().min(described + 1);
            for pair in stack[..compared].windows(2) {
                let functions = (self.translate(&pair[1], &aliases), self.translate(&pair[0], &aliases));
                let (Some(caller), Some(callee)) = functions else { continue };
                found.total += 1;
                let edge = (caller, callee);
                if self.edges.contains(&edge) {
                    found.found += 1;
                } else {
                    let callers = || self.callers(&edge.1);
                    found.missing.entry(edge.clone()).or_insert_with(|| (0, callers())).0 += 1;
                }
            }
        }
        found
    }

    /// Whom the agent has seen calling a function.
    fn callers(&self, callee: &Function) -> Vec<String> {
        self.edges.iter().filter(|edge| edge.1 == *callee).map(|edge| edge.0.1.clone()).collect()
    }

    fn aliases(&self, of_perf: &[Vec<perf::Frame>]) -> HashMap<Function, String> {
        let frames = of_perf.iter().flatten();
        frames
            .filter_map(|frame| {
                let symbol = frame.symbol.clone()?;
                let known = self.functions.get(&(frame.file.clone(), frame.address))?;
                Some(((frame.file.clone(), symbol), known.clone()))
            })
            .collect()
    }

    fn translate(&self, frame: &perf::Frame, aliases: &HashMap<Function, String>) -> Option<Function> {
        if let Some(known) = self.functions.get(&(frame.file.clone(), frame.address)) {
            return Some((frame.file.clone(), known.clone()));
        }
        let function = (frame.file.clone(), frame.symbol.clone()?);
        let name = aliases.get(&function).cloned().unwrap_or_else(|| function.1.clone());
        Some((function.0, name))
    }
}

/// Whether the frame's code may have call frame information. V8 writes its built-ins into the binary without any.
fn is_described(frame: &perf::Frame) -> bool {
    frame.symbol.as_deref().is_some_and(|symbol| !symbol.starts_with("Builtins_"))
}

/// How many of perf's calls the agent has seen.
#[derive(Debug, Default)]
pub struct EdgesFound {
    pub total: u64,
    pub found: u64,
    /// How often perf has those that the agent has not, and the callers that the agent has instead.
    pub missing: HashMap<Edge, (u64, Vec<String>)>,
}

impl EdgesFound {
    /// `None` where perf has no call to compare.
    pub fn share(&self) -> Option<f64> {
        (self.total > 0).then(|| self.found as f64 / self.total as f64)
    }

    /// The most frequent ones that are missing.
    pub fn worst(&self) -> String {
        let mut missing: Vec<_> = self.missing.iter().collect();
        missing.sort_by_key(|(_, (count, _))| std::cmp::Reverse(*count));
        let missing = missing.iter().take(8);
        let text = missing.map(|((caller, callee), (count, callers))| {
            format!("{count} of {} > {}, instead {callers:?}", caller.1, callee.1)
        });
        text.collect::<Vec<_>>().join("; ")
    }
}

fn function(profile: &Profile, location: &Location) -> Function {
    let mapping = profile.mapping(location.mapping_id).and_then(|mapping| profile.string(mapping.filename));
    let file = mapping.unwrap_or_default().trim_end_matches(" (deleted)").rsplit('/').next();
    (file.unwrap_or_default().to_owned(), name(profile, location))
}

/// The function that the frame belongs to: inlined calls come before it.
fn name(profile: &Profile, location: &Location) -> String {
    let function = location.line.last().and_then(|line| profile.function(line.function_id));
    let name = function.and_then(|function| profile.string(function.name));
    name.map_or_else(|| format!("{:#x}", location.address), str::to_owned)
}
