//! Attaches and detaches: the thread `heap`.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc,
        atomic::Ordering::Relaxed,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use profiler_common::heap::{Hits, POINTS_MAX, SCALE_ONE, TARGETS_MAX, Target};
use tracing::{error, info, warn};

use super::{
    Costs, HeapError, HeapGauges, HeapState, Notes, Options, Told,
    budget::{Budget, Governor, Step, WINDOW_NS},
    calibrate,
    find::Finder,
    notes::InUse,
    probes::{Attached, Wanted, flags, take_out_together},
    rules::{Rules, Setting},
    seccomp,
};
use crate::{
    bpf::{HeapProgram, Links},
    label::{Labeler, SeriesLabels},
    process::{ImageReader, Processes},
    sys::{clock, random},
};

/// Time between two readings of what probes cost.
const TICK: Duration = Duration::from_millis(250);
/// Time between two looks at the processes that are profiled.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Time between two looks at all processes: for those whose exec or fork was not seen.
const SCAN_INTERVAL: Duration = Duration::from_secs(10);
/// A dynamic linker that has not finished is asked again after this long, so many times.
const LINKER_DELAY: Duration = Duration::from_millis(100);
const LINKER_TRIES: u32 = 50;
/// A child that has been forked is given this long to exec: then it is another program.
const EXEC_DELAY: Duration = Duration::from_millis(20);
/// A window begins this long after its probes are in: no program may see its beginning without its scale.
const BEGIN_DELAY_NS: u64 = 10_000_000;

/// A process that is to be looked at.
struct Due {
    pid: u32,
    at: Instant,
    tries: u32,
    /// It was met in a look at all processes: those that are new go before it.
    is_of_scan: bool,
}

/// Attaches and detaches. Owned by its thread.
pub(crate) struct Profiler {
    program: HeapProgram,
    options: Options,
    rules: Rules,
    /// For labels; its table stays empty.
    processes: Processes,
    finder: Finder,
    attached: HashMap<u32, Attached>,
    /// Start of each process that was looked at.
    seen: HashMap<u32, u64>,
    due: VecDeque<Due>,
    /// Of these: those of looks at all processes.
    scan_left: usize,
    free_slots: Vec<u32>,
    free_points: Vec<u32>,
    next_id: u32,
    state: State,
    costs: Costs,
    /// Whether a process under a seccomp filter may have its returns probed.
    survives_seccomp: bool,
    notes: Notes,
    gauges: Arc<HeapGauges>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// What the kernel can do is not known yet.
    New,
    Running,
    Paused,
    /// The kernel does not do it.
    Failed,
}

impl Profiler {
    /// Profiles nobody yet.
    pub(crate) fn new(
        program: HeapProgram,
        rules: Rules,
        options: Options,
        (processes, images): (Processes, ImageReader),
        notes: Notes,
        gauges: Arc<HeapGauges>,
    ) -> Self {
        notes.set_rate(rules.stated_rate());
        Self {
            program,
            options,
            rules,
            processes,
            finder: Finder::new(images),
            attached: HashMap::new(),
            seen: HashMap::new(),
            due: VecDeque::new(),
            scan_left: 0,
            free_slots: (0..TARGETS_MAX).rev().collect(),
            free_points: (0..POINTS_MAX).rev().collect(),
            next_id: 1,
            state: State::New,
            costs: Costs::default(),
            survives_seccomp: false,
            notes,
            gauges,
        }
    }

    /// Follows processes until it is told to stop. All probes are gone when it returns.
    pub(crate) fn run(mut self, told: &Receiver<Told>) {
        let (mut ticked, mut looked, mut scanned) = (Instant::now(), Instant::now(), Instant::now());
        loop {
            match told.recv_timeout(self.wait(ticked)) {
                Ok(Told::Exec { pid, time_ns }) => self.exec(pid, time_ns),
                // Another parent's child is not meant either, unless it execs or a family goes on through it.
                Ok(Told::Fork { parent, child })
                    if self.attached.contains_key(&parent) || self.rules.have_families() =>
                {
                    self.look_later(child, EXEC_DELAY);
                }
                Ok(Told::Fork { .. }) => {}
                Ok(Told::Rules(rules)) => self.set_rules(rules),
                Ok(Told::Labels(labeler)) => self.set_labels(labeler),
                Ok(Told::Resume) => self.resume(),
                Ok(Told::Pause) => self.pause(),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Told::Stop) | Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.state != State::Running {
                continue;
            }
            self.look_at_due();
            if ticked.elapsed() >= TICK || self.is_step_due() {
                ticked = Instant::now();
                self.keep_to_budgets();
            }
            if looked.elapsed() >= LOOK_INTERVAL {
                looked = Instant::now();
                self.look_after_attached();
            }
            if scanned.elapsed() >= SCAN_INTERVAL {
                scanned = Instant::now();
                self.scan();
            }
        }
        self.end();
    }

    fn wait(&self, ticked: Instant) -> Duration {
        if self.state != State::Running {
            return LOOK_INTERVAL;
        }
        let due = self.due.iter().map(|due| due.at).min();
        let due = due.map(|at| at.saturating_duration_since(Instant::now()));
        let step = self.next_step_ns().map(clock::until);
        let tick = if self.attached.is_empty() { LOOK_INTERVAL } else { TICK };
        [due, step].into_iter().flatten().fold(tick.saturating_sub(ticked.elapsed()), Duration::min)
    }

    fn next_step_ns(&self) -> Option<u64> {
        self.attached.values().filter_map(|attached| attached.governor.next_ns()).min()
    }

    fn is_step_due(&self) -> bool {
        self.next_step_ns().is_some_and(|at_ns| at_ns <= clock::boot_ns())
    }

    fn resume(&mut self) {
        if self.state == State::New {
            self.prepare();
        }
        if self.state != State::Failed {
            self.state = State::Running;
            self.scan();
        }
    }

    /// Finds out what this kernel can do and what it costs.
    fn prepare(&mut self) {
        match calibrate::prepare(&mut self.program, self.finder.images(), &self.options) {
            Ok(calibrate::Ready { kind, costs, survives_seccomp }) => {
                self.state = State::Paused;
                (self.costs, self.survives_seccomp) = (costs, survives_seccomp);
                self.gauges.set_costs(costs);
                let Costs { entry_ns, return_ns, stepped_ns } = costs;
                info!(
                    ?kind,
                    entry_ns = entry_ns.round(),
                    return_ns = return_ns.round(),
                    stepped_ns = stepped_ns.round(),
                    survives_seccomp,
                    "heap profiling is ready"
                );
            }
            Err(error) => {
                self.state = State::Failed;
                self.gauges.has_failed.store(true, Relaxed);
                let error = format!("{:#}", anyhow::Error::from(error));
                error!(error, "no heap is profiled");
            }
        }
    }

    /// Takes all probes out, and begins anew when it is resumed.
    fn pause(&mut self) {
        self.detach_all();
        self.seen.clear();
        self.due.clear();
        self.scan_left = 0;
        if self.state == State::Running {
            self.state = State::Paused;
        }
    }

    /// Takes all probes out. Whose samples were followed stays known: the last snapshot is of those that have not ended.
    fn end(mut self) {
        self.detach_ended();
        let mut links = Vec::new();
        for (_, attached) in std::mem::take(&mut self.attached) {
            self.count_hits(&attached);
            links.extend(attached.release(&mut self.free_points));
        }
        take_out_together(links);
    }

    fn detach_all(&mut self) {
        let attached: Vec<u32> = self.attached.keys().copied().collect();
        take_out_together(attached.into_iter().flat_map(|pid| self.let_go(pid)).collect());
        self.show();
    }

    /// Goes by other rules from now on. Samples taken before keep their rate.
    fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
        self.notes.set_rate(self.rules.stated_rate());
        let attached: Vec<u32> = self.attached.keys().copied().collect();
        for pid in attached {
            let labels = self.processes.series_of(pid);
            match self.setting(pid, &labels) {
                None => self.detach(pid),
                Some(setting) => {
                    if let Err(error) = self.set(pid, setting) {
                        self.lose(pid, error);
                    }
                }
            }
        }
        self.seen.clear();
        if self.state == State::Running {
            self.scan();
        }
    }

    /// Other labels may be meant by other rules.
    fn set_labels(&mut self, labeler: Labeler) {
        self.processes.set_labeler(labeler);
        let now_ns = clock::boot_ns();
        for (&pid, attached) in &self.attached {
            self.notes.set_series(attached.slot, self.processes.series_of(pid), now_ns);
        }
        self.set_rules(self.rules.clone());
    }

    fn set(&mut self, pid: u32, Setting { rate, budget }: Setting) -> Result<(), HeapError> {
        let Some(attached) = self.attached.get_mut(&pid) else { return Ok(()) };
        if attached.target.rate != rate {
            attached.set_rate(&mut self.program, rate)?;
            info!(pid, rate, "the heap is profiled at another rate");
            let (functions, file) = (attached.functions(), attached.files());
            self.gauges.states.set(pid, HeapState::Profiled { rate, file, functions });
        }
        if attached.governor.budget() != budget {
            attached.governor.set_budget(budget);
            self.notes.set_budget(attached.slot, budget);
            info!(pid, %budget, "the heap is profiled with another budget");
        }
        Ok(())
    }

    /// What was known of the process is void, if it was known by then.
    fn exec(&mut self, pid: u32, time_ns: u64) {
        if self.attached.get(&pid).is_some_and(|attached| attached.looked_ns > time_ns) {
            return;
        }
        self.detach(pid);
        self.gauges.states.forget(pid);
        self.seen.remove(&pid);
        self.look_later(pid, Duration::ZERO);
    }

    fn look_later(&mut self, pid: u32, delay: Duration) {
        if self.state == State::Running {
            self.due.push_back(Due { pid, at: Instant::now() + delay, tries: 0, is_of_scan: false });
        }
    }

    /// Has every process looked at that has come since and is meant, one at a time: attaching to many takes long, and
    /// meanwhile others exec, budgets are to be kept and orders come.
    fn scan(&mut self) {
        let pids: HashSet<u32> = self.finder.images().pids().into_iter().collect();
        self.seen.retain(|pid, _| pids.contains(pid));
        self.gauges.states.retain(|pid| pids.contains(&pid));
        for pid in pids {
            let start = self.finder.images().start_ticks(pid);
            let Some(start_ticks) = start.filter(|_| self.seen.get(&pid).copied() != start) else { continue };
            self.seen.insert(pid, start_ticks);
            if self.setting(pid, &self.processes.series_of(pid)).is_some() {
                self.due.push_back(Due { pid, at: Instant::now(), tries: 0, is_of_scan: true });
                self.scan_left += 1;
            }
        }
        if self.scan_left == 0 {
            self.gauges.scans.fetch_add(1, Relaxed);
        }
    }

    /// Looks at one of the processes whose time has come.
    fn look_at_due(&mut self) {
        let now = Instant::now();
        let ready =
            |is_of_scan: bool| self.due.iter().position(|due| due.at <= now && due.is_of_scan == is_of_scan);
        let Some(due) = ready(false).or_else(|| ready(true)).and_then(|at| self.due.remove(at)) else {
            return;
        };
        let is_of_scan = due.is_of_scan;
        self.look_at(due);
        if is_of_scan {
            self.scan_left -= 1;
            if self.scan_left == 0 {
                self.gauges.scans.fetch_add(1, Relaxed);
            }
        }
    }

    /// Profiles the process if a rule says so.
    fn look_at(&mut self, due: Due) {
        let Due { pid, at: _, tries, is_of_scan: _ } = due;
        let Some(start_ticks) = self.finder.images().start_ticks(pid) else { return };
        self.seen.insert(pid, start_ticks);
        if self.attached.contains_key(&pid) || pid == std::process::id() {
            return;
        }
        let labels = self.processes.series_of(pid);
        let Some(setting) = self.setting(pid, &labels) else { return };
        match self.attach(pid, start_ticks, setting) {
            Ok(()) => {}
            Err(HeapError::NotReady) if tries < LINKER_TRIES => {
                let at = Instant::now() + LINKER_DELAY;
                self.due.push_back(Due { pid, at, tries: tries + 1, is_of_scan: false });
            }
            Err(error) => self.refuse(pid, error),
        }
    }

    fn setting(&self, pid: u32, labels: &SeriesLabels) -> Option<Setting> {
        self.rules.of(pid, labels, || self.program.is_of_family(pid))
    }

    fn refuse(&self, pid: u32, error: HeapError) {
        self.gauges.refused.fetch_add(1, Relaxed);
        let why = format!("{:#}", anyhow::Error::from(error));
        warn!(pid, error = %why, "heap is not profiled");
        self.gauges.states.set(pid, HeapState::Refused { why });
    }

    /// A process that cannot be followed any longer.
    fn lose(&mut self, pid: u32, error: HeapError) {
        self.detach(pid);
        // One that has ended is no failure.
        if self.finder.images().start_ticks(pid).is_some() {
            self.refuse(pid, error);
        }
    }

    fn attach(&mut self, pid: u32, start_ticks: u64, setting: Setting) -> Result<(), HeapError> {
        let looked_ns = clock::boot_ns();
        let objects = self.finder.objects(pid)?;
        let found = self.finder.allocators(pid, &objects)?;
        let slot = self.free_slots.pop().ok_or_else(HeapError::full)?;
        let in_use = if self.may_probe_returns(pid) { InUse::Known } else { InUse::Seccomp };
        let Setting { rate, budget } = setting;
        let id = self.new_id();
        let flags = flags(&self.program, in_use);
        let target = Target { id, rate, scale: SCALE_ONE, flags, begin_ns: 0, end_ns: 0 };
        let governor = Governor::new(budget, clock::boot_ns());
        let mut attached = Attached::new((start_ticks, looked_ns), slot, objects, governor, target, in_use);
        attached.hits = self.program.hits(slot).unwrap_or_default();
        let wanted = Wanted { allocs: true, frees: in_use == InUse::Known };
        let result = attached
            .write(&mut self.program)
            .map_err(HeapError::from)
            .and_then(|()| attached.add(&mut self.program, found, &mut self.free_points))
            .and_then(|()| attached.probe(&self.program, pid, wanted));
        if let Err(error) = result {
            attached.take_out(&mut self.free_points);
            self.free_slots.push(slot);
            return Err(error);
        }
        let (functions, files) = (attached.functions(), attached.files());
        self.attached.insert(pid, attached);
        self.begin(pid, budget)?;
        self.gauges.attached.fetch_add(1, Relaxed);
        info!(pid, rate, %budget, functions, files, "profiling the heap");
        self.processes.request_tables(pid);
        self.gauges.states.set(pid, HeapState::Profiled { rate, file: files, functions });
        if in_use == InUse::Seccomp {
            tell_seccomp(pid);
        }
        Ok(())
    }

    /// Takes the first samples.
    fn begin(&mut self, pid: u32, budget: Budget) -> Result<(), HeapError> {
        let Some(attached) = self.attached.get_mut(&pid) else { return Ok(()) };
        let (now_ns, slot) = (clock::boot_ns(), attached.slot);
        self.notes.begin(slot, pid, self.processes.series_of(pid), budget, now_ns);
        self.notes.set_in_use(slot, attached.in_use);
        self.notes.open_span(slot, now_ns, u64::MAX, 1.0);
        if attached.in_use == InUse::Known {
            self.notes.follow(attached.target.id);
        }
        let result = attached.set_time(&mut self.program, (now_ns, u64::MAX), 1.0);
        self.show();
        if let Err(error) = result {
            self.detach(pid);
            return Err(error.into());
        }
        Ok(())
    }

    fn new_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn may_probe_returns(&mut self, pid: u32) -> bool {
        self.survives_seccomp || !seccomp::is_filtered(&self.finder.images().directory(pid))
    }

    /// Reads what probes cost, and does what the budgets want.
    fn keep_to_budgets(&mut self) {
        let pids: Vec<u32> = self.attached.keys().copied().collect();
        for pid in pids {
            if let Err(error) = self.keep_to_budget(pid) {
                self.lose(pid, error);
            }
        }
        self.show();
    }

    fn keep_to_budget(&mut self, pid: u32) -> Result<(), HeapError> {
        let Some(attached) = self.attached.get_mut(&pid) else { return Ok(()) };
        let hits = self.program.hits(attached.slot)?;
        let spent = self.costs.of(since(attached.hits, hits));
        self.gauges.hits.fetch_add(entries(hits) - entries(attached.hits), Relaxed);
        self.gauges.probe_ns.fetch_add((spent.total() * 1e9) as u64, Relaxed);
        attached.hits = hits;
        match attached.governor.observe(clock::boot_ns(), spent, random_share()) {
            None => Ok(()),
            Some(Step::Close) => self.close(pid),
            Some(Step::Open) => self.open(pid),
            Some(Step::OpenForGood) => self.open_for_good(pid),
        }
    }

    /// Ends samples for now.
    fn close(&mut self, pid: u32) -> Result<(), HeapError> {
        let now_ns = clock::boot_ns();
        let id = self.new_id();
        let Some(attached) = self.attached.get_mut(&pid) else { return Ok(()) };
        let (slot, budget) = (attached.slot, attached.governor.budget());
        let is_first = attached.target.end_ns == u64::MAX;
        attached.stop(&mut self.program, now_ns)?;
        self.notes.close_span(slot, now_ns);
        if is_first {
            self.gauges.above_budget.fetch_add(1, Relaxed);
            info!(pid, %budget, "the heap's probes cost more than their budget: sampling in windows");
        }
        let keeps_frees = attached.governor.keeps_frees();
        if attached.in_use == InUse::Known && !keeps_frees {
            self.notes.unfollow(attached.target.id);
            self.notes.set_in_use(slot, InUse::FreesTooDear);
            attached.set_in_use(&mut self.program, InUse::FreesTooDear, id)?;
            warn!(pid, %budget, "the heap's frees alone cost more than half of the budget: what is in use is not known");
        }
        let frees = attached.in_use == InUse::Known;
        attached.probe(&self.program, pid, Wanted { allocs: false, frees })
    }

    /// Takes samples for a window.
    fn open(&mut self, pid: u32) -> Result<(), HeapError> {
        let Some(attached) = self.attached.get_mut(&pid) else { return Ok(()) };
        let frees = attached.in_use == InUse::Known;
        attached.probe(&self.program, pid, Wanted { allocs: true, frees })?;
        let begin_ns = clock::boot_ns() + BEGIN_DELAY_NS;
        let end_ns = begin_ns + WINDOW_NS;
        let scale = attached.governor.opened(begin_ns, end_ns);
        self.notes.open_span(attached.slot, begin_ns, end_ns, scale);
        self.gauges.windows.fetch_add(1, Relaxed);
        Ok(attached.set_time(&mut self.program, (begin_ns, end_ns), scale)?)
    }

    /// Takes samples all the time again. What is in use is known anew if it was not.
    fn open_for_good(&mut self, pid: u32) -> Result<(), HeapError> {
        let id = self.new_id();
        let Some(attached) = self.attached.get_mut(&pid) else { return Ok(()) };
        let slot = attached.slot;
        if attached.in_use == InUse::FreesTooDear {
            attached.set_in_use(&mut self.program, InUse::Known, id)?;
            self.notes.set_in_use(slot, InUse::Known);
            self.notes.follow(id);
        }
        let frees = attached.in_use == InUse::Known;
        attached.probe(&self.program, pid, Wanted { allocs: true, frees })?;
        let begin_ns = clock::boot_ns() + BEGIN_DELAY_NS;
        self.notes.open_span(slot, begin_ns, u64::MAX, 1.0);
        attached.set_time(&mut self.program, (begin_ns, u64::MAX), 1.0)?;
        info!(pid, "the heap's probes keep to their budget: sampling all the time");
        Ok(())
    }

    /// Lets go of processes that have ended, and follows what the others load and take up.
    fn look_after_attached(&mut self) {
        self.detach_ended();
        let pids: Vec<u32> = self.attached.keys().copied().collect();
        for pid in pids {
            let followed = self.follow_seccomp(pid).and_then(|()| self.follow_objects(pid));
            if let Err(error) = followed {
                self.lose(pid, error);
            }
        }
    }

    fn detach_ended(&mut self) {
        let starts: Vec<_> =
            self.attached.iter().map(|(&pid, attached)| (pid, attached.start_ticks)).collect();
        for (pid, start_ticks) in starts {
            if self.finder.images().start_ticks(pid) != Some(start_ticks) {
                self.detach(pid);
            }
        }
    }

    fn follow_seccomp(&mut self, pid: u32) -> Result<(), HeapError> {
        if self.may_probe_returns(pid) {
            return Ok(());
        }
        let id = self.new_id();
        let Some(attached) = self.attached.get_mut(&pid) else { return Ok(()) };
        if attached.in_use == InUse::Seccomp {
            return Ok(());
        }
        // From here on, no entry asks for a return.
        self.notes.unfollow(attached.target.id);
        attached.set_in_use(&mut self.program, InUse::Seccomp, id)?;
        attached.drop_returns();
        self.notes.set_in_use(attached.slot, InUse::Seccomp);
        tell_seccomp(pid);
        let allocs = clock::boot_ns() < attached.target.end_ns;
        attached.probe(&self.program, pid, Wanted { allocs, frees: false })
    }

    /// Probes allocators that have been loaded since.
    fn follow_objects(&mut self, pid: u32) -> Result<(), HeapError> {
        let objects = match self.finder.objects(pid) {
            Ok(objects) => objects,
            // The next look will tell.
            Err(_) => return Ok(()),
        };
        if self.attached.get(&pid).is_none_or(|attached| attached.objects == objects) {
            return Ok(());
        }
        let found = self.finder.allocators(pid, &objects)?;
        let Some(attached) = self.attached.get_mut(&pid) else { return Ok(()) };
        attached.objects = objects;
        attached.keep(&found, &mut self.free_points);
        let before = attached.functions();
        attached.add(&mut self.program, found, &mut self.free_points)?;
        if attached.functions() == before {
            return Ok(());
        }
        info!(
            pid,
            files = attached.files(),
            "the process has loaded another allocator, which is profiled too"
        );
        let allocs = clock::boot_ns() < attached.target.end_ns;
        let frees = attached.in_use == InUse::Known;
        attached.probe(&self.program, pid, Wanted { allocs, frees })
    }

    fn detach(&mut self, pid: u32) {
        drop(self.let_go(pid));
        self.show();
    }

    /// Forgets a process. Its number and those of its functions may be used again when the probes are out.
    fn let_go(&mut self, pid: u32) -> Vec<Links> {
        let Some(attached) = self.attached.remove(&pid) else { return Vec::new() };
        let (slot, id) = (attached.slot, attached.target.id);
        self.count_hits(&attached);
        let links = attached.release(&mut self.free_points);
        self.notes.unfollow(id);
        self.notes.end(slot, clock::boot_ns());
        self.gauges.states.forget(pid);
        self.free_slots.push(slot);
        info!(pid, "the heap is no longer profiled");
        links
    }

    /// Counts what it has cost since the last reading.
    fn count_hits(&self, attached: &Attached) {
        let Ok(hits) = self.program.hits(attached.slot) else { return };
        let spent = self.costs.of(since(attached.hits, hits));
        self.gauges.hits.fetch_add(entries(hits) - entries(attached.hits), Relaxed);
        self.gauges.probe_ns.fetch_add((spent.total() * 1e9) as u64, Relaxed);
    }

    fn show(&self) {
        let count = |is_so: fn(&Attached) -> bool| {
            self.attached.values().filter(|attached| is_so(attached)).count() as u64
        };
        self.gauges.targets.store(count(|_| true), Relaxed);
        self.gauges.limited.store(count(|attached| attached.governor.is_limited()), Relaxed);
        self.gauges.without_in_use.store(count(|attached| attached.in_use != InUse::Known), Relaxed);
        self.gauges.entry_only.store(count(|attached| attached.in_use == InUse::Seccomp), Relaxed);
    }
}

fn tell_seccomp(pid: u32) {
    warn!(
        pid,
        "the process is under a seccomp filter, which on this kernel might kill it for a probed return: its allocations are \
         profiled, what is in use is not"
    );
}

fn since(before: Hits, now: Hits) -> Hits {
    Hits {
        allocs: now.allocs - before.allocs,
        frees: now.frees - before.frees,
        returns: now.returns - before.returns,
        sample_ns: now.sample_ns - before.sample_ns,
    }
}

fn entries(hits: Hits) -> u64 {
    hits.allocs + hits.frees
}

/// From 0 to 1; the middle where the kernel gives no random bytes.
fn random_share() -> f64 {
    let bits = random::bytes::<4>().map_or(1 << 31, u32::from_ne_bytes);
    f64::from(bits) / f64::from(u32::MAX)
}
