//! CPU time of a part of this process: of the threads with certain names.

use std::{collections::HashMap, fs, time::Duration};

/// The threads whose name is one of `names`. What they take is read from their own clocks.
#[derive(Debug)]
pub(crate) struct ThreadGroup {
    names: &'static [&'static str],
    /// Time of each thread known, 0 for those of other names.
    known: HashMap<u32, Thread>,
    /// Time of those that have ended.
    ended: Duration,
}

#[derive(Debug)]
struct Thread {
    is_member: bool,
    time: Duration,
    is_alive: bool,
}

impl ThreadGroup {
    /// Names are of at most 15 bytes, as the kernel cuts them, and set before a thread does anything.
    pub(crate) fn new(names: &'static [&'static str]) -> Self {
        Self { names, known: HashMap::new(), ended: Duration::ZERO }
    }

    /// CPU time of the group since the process began. What a thread took between the last call and its end is missing.
    pub(crate) fn cpu_time(&mut self) -> Duration {
        self.known.values_mut().for_each(|thread| thread.is_alive = false);
        for tid in tids() {
            let names = self.names;
            let thread = self.known.entry(tid).or_insert_with(|| Thread {
                is_member: name(tid).is_some_and(|name| names.contains(&name.trim_end())),
                time: Duration::ZERO,
                is_alive: true,
            });
            thread.is_alive = true;
            if thread.is_member {
                thread.time = cpu_time(tid).unwrap_or(thread.time);
            }
        }
        let ended = &mut self.ended;
        self.known.retain(|_, thread| {
            if !thread.is_alive {
                *ended += thread.time;
            }
            thread.is_alive
        });
        self.ended + self.known.values().map(|thread| thread.time).sum::<Duration>()
    }
}

/// The threads of this process.
fn tids() -> impl Iterator<Item = u32> {
    let directory = fs::read_dir("/proc/self/task");
    directory.into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn name(tid: u32) -> Option<String> {
    fs::read_to_string(format!("/proc/self/task/{tid}/comm")).ok()
}

/// CPU time of a thread of this process; `None` when it has ended.
fn cpu_time(tid: u32) -> Option<Duration> {
    const PER_THREAD: i32 = 4;
    read_clock(tid, PER_THREAD)
}

/// CPU time of a process, its ended threads included; `None` when there is none.
pub(crate) fn process_cpu_time(pid: u32) -> Option<Duration> {
    read_clock(pid, 0)
}

/// Source: include/linux/posix-timers_types.h: a clock's number is the complement of the id above the bits
/// `CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED`.
fn read_clock(id: u32, kind: i32) -> Option<Duration> {
    const SCHED: i32 = 2;
    let clock = (!id.cast_signed() << 3) | kind | SCHED;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec that outlives the call; a clock that does not exist is an error.
    let status = unsafe { libc::clock_gettime(clock, &raw mut time) };
    let nanoseconds = u32::try_from(time.tv_nsec).ok()?;
    (status == 0).then(|| Duration::new(time.tv_sec.unsigned_abs(), nanoseconds))
}

#[cfg(test)]
mod tests {
    use std::{
        sync::mpsc::{Receiver, channel},
        thread,
    };

    use super::*;

    #[test]
    fn a_process_has_a_clock_while_it_is_there() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let (own, of_child) = (process_cpu_time(std::process::id()), process_cpu_time(child.id()));
        child.kill().and_then(|()| child.wait()).expect("it ends");
        assert!(own > Some(Duration::ZERO) && of_child < Some(Duration::from_secs(1)) && of_child.is_some());
        assert_eq!(process_cpu_time(child.id()), None);
    }

    /// Uses so much CPU time, tells, and waits.
    fn burn(time: Duration, done: &std::sync::mpsc::Sender<()>, wait: &Receiver<()>) {
        // SAFETY: takes nothing.
        let own = unsafe { libc::gettid() }.unsigned_abs();
        while cpu_time(own).expect("it lives") < time {
            std::hint::spin_loop();
        }
        done.send(()).expect("a receiver");
        let _ = wait.recv();
    }

    #[test]
    fn threads_count_by_name_also_when_they_have_ended() {
        const NAME: &str = "of-the-group";
        const TIME: Duration = Duration::from_millis(30);
        let mut group = ThreadGroup::new(&[NAME]);
        assert_eq!(group.cpu_time(), Duration::ZERO);
        let (done, is_done) = channel();
        let start = |name: &str| {
            let (end, wait) = channel();
            let done = done.clone();
            let thread = thread::Builder::new().name(name.to_owned());
            (thread.spawn(move || burn(TIME, &done, &wait)).expect("a thread"), end)
        };
        let (member, end_member) = start(NAME);
        let (_other, _end_other) = start("of-none");
        is_done.recv().expect("two ends");
        is_done.recv().expect("two ends");
        let used = group.cpu_time();
        assert!((TIME..2 * TIME).contains(&used), "{used:?}");
        drop(end_member);
        member.join().expect("it ends");
        // The kernel takes a thread off the list some time after it has woken those who join it.
        let left =
            |group: &mut ThreadGroup| (group.cpu_time(), group.known.values().any(|thread| thread.is_member));
        let after = std::iter::repeat_with(|| left(&mut group)).find(|(_, is_listed)| !is_listed);
        assert!(after.is_some_and(|(after, _)| after >= used));
    }
}
