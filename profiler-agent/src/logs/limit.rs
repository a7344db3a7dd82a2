//! A bound on log lines of one cause: what happens again and again is told some times a minute, and counted.

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tracing::{Event, Level, Subscriber, callsite::Identifier};
use tracing_subscriber::layer::{Context, Layer};

/// Lines of one place in the code in a term: at the start a few places have one line for each thing that is missing.
const LINES_MAX: u32 = 20;
const TERM: Duration = Duration::from_secs(60);

/// Lines that were left out since the start.
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// How many lines were left out, of all causes.
pub(crate) fn lines_left_out() -> u64 {
    LEFT_OUT.load(Relaxed)
}

/// The layer that leaves them out. Debug and trace lines are asked for, and all told.
#[derive(Debug, Default)]
pub(super) struct Limit {
    terms: Mutex<HashMap<Identifier, Term>>,
}

#[derive(Clone, Copy, Debug)]
struct Term {
    began: Instant,
    lines: u32,
}

impl Limit {
    /// Whether a line of a cause is told now.
    fn has_room(&self, cause: Identifier, now: Instant) -> bool {
        let mut terms = self.terms.lock().unwrap_or_else(PoisonError::into_inner);
        // As many as there are places in the code that log.
        let term = terms.entry(cause).or_insert(Term { began: now, lines: 0 });
        if now.saturating_duration_since(term.began) >= TERM {
            *term = Term { began: now, lines: 0 };
        }
        term.lines = term.lines.saturating_add(1);
        term.lines <= LINES_MAX
    }
}

impl<S: Subscriber> Layer<S> for Limit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO || self.has_room(metadata.callsite(), Instant::now()) {
            return true;
        }
        LEFT_OUT.fetch_add(1, Relaxed);
        false
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::{fmt, layer::SubscriberExt as _};

    use super::*;
    use crate::logs::Recent;

    #[test]
    fn one_cause_fills_no_log_and_hides_no_other() {
        let recent = Recent::default();
        let kept = fmt::layer().with_ansi(false).with_target(false).with_writer(recent.clone());
        let subscriber = tracing_subscriber::registry().with(Limit::default()).with(kept);
        let before = lines_left_out();
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..LINES_MAX + 5 {
                tracing::warn!(number, "again");
                tracing::debug!("asked for");
            }
            tracing::warn!("another");
        });
        let text = recent.text();
        let lines = |part: &str| text.lines().filter(|line| line.contains(part)).count();
        assert_eq!((lines("again"), lines("another")), (LINES_MAX as usize, 1), "{text}");
        assert_eq!(lines("asked for"), LINES_MAX as usize + 5);
        assert!(lines_left_out() >= before + 5);
    }

    #[test]
    fn a_cause_is_told_again_in_the_next_term() {
        let limit = Limit::default();
        let cause = {
            use tracing::callsite::Callsite as _;
            let callsite = tracing::callsite!(name: "x", kind: tracing::metadata::Kind::EVENT, fields:);
            callsite.metadata().callsite()
        };
        let now = Instant::now();
        let told = |now| (0..LINES_MAX * 2).filter(|_| limit.has_room(cause.clone(), now)).count();
        assert_eq!(told(now), LINES_MAX as usize);
        assert_eq!(told(now + TERM / 2), 0);
        assert_eq!(told(now + TERM), LINES_MAX as usize);
    }
}
