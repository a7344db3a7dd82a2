//! Log lines: to standard error, and the latest of them in memory for a support bundle.

mod limit;

use std::{
    collections::VecDeque,
    io::{self, IsTerminal as _, Write},
    sync::{Arc, Mutex, PoisonError},
};

use tracing_subscriber::{
    EnvFilter, Layer as _, Registry,
    fmt::{self, MakeWriter},
    layer::SubscriberExt as _,
    reload,
    util::SubscriberInitExt as _,
};

use crate::config::{ConfigError, LogFormat};
use limit::Limit;
pub(crate) use limit::lines_left_out;

/// Lines remembered: the start, and some hours of a quiet agent. At most 128 KiB.
const RECENT_LINES_MAX: usize = 256;
/// Bytes remembered of one line.
const RECENT_LINE_BYTES_MAX: usize = 512;

/// The running log.
#[derive(Clone, Debug)]
pub(crate) struct Logs {
    filter: reload::Handle<EnvFilter, Registry>,
    recent: Recent,
}

impl Logs {
    /// Starts logging to standard error.
    pub(crate) fn start(filter: &str, format: LogFormat) -> Result<Self, ConfigError> {
        let (filter, handle) = reload::Layer::new(parse_filter(filter)?);
        let recent = Recent::default();
        let shown = fmt::layer().with_writer(io::stderr);
        let shown = match format {
            LogFormat::Text => shown.with_ansi(io::stderr().is_terminal()).with_target(false).boxed(),
            LogFormat::Json => shown.json().boxed(),
        };
        let kept = fmt::layer().with_ansi(false).with_target(false).with_writer(recent.clone());
        tracing_subscriber::registry().with(filter).with(Limit::default()).with(shown).with(kept).init();
        Ok(Self { filter: handle, recent })
    }

    /// Logs by another filter from now on.
    pub(crate) fn set_filter(&self, filter: &str) -> Result<(), ConfigError> {
        let parsed = parse_filter(filter)?;
        // Fails only when nothing logs any more.
        let _ = self.filter.reload(parsed);
        Ok(())
    }

    /// The latest lines, oldest first.
    pub(crate) fn recent(&self) -> String {
        self.recent.text()
    }
}

/// A filter of log lines; also how the configuration checks one.
pub(crate) fn parse_filter(filter: &str) -> Result<EnvFilter, ConfigError> {
    let accepted = "accepted: error, warn, info, debug, trace, or a tracing filter";
    EnvFilter::try_new(filter)
        .map_err(|error| ConfigError::new("log", filter, format!("{error}; {accepted}")))
}

/// The latest lines.
#[derive(Clone, Debug, Default)]
struct Recent(Arc<Mutex<VecDeque<String>>>);

impl Recent {
    fn push(&self, line: &str) {
        let end = line.floor_char_boundary(RECENT_LINE_BYTES_MAX);
        let line = line.get(..end).unwrap_or_default().trim_end().to_owned();
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() >= RECENT_LINES_MAX {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    fn text(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| format!("{line}\n")).collect()
    }
}

/// A line is written by one call. Source: tracing_subscriber::fmt::Layer, which formats into a buffer of its own.
impl Write for Recent {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(&String::from_utf8_lossy(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Recent {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_lines_are_kept_and_no_more() {
        let recent = Recent::default();
        for number in 0..RECENT_LINES_MAX + 3 {
            recent.push(&format!("line {number}\n"));
        }
        let text = recent.text();
        assert_eq!(text.lines().count(), RECENT_LINES_MAX);
        assert!(text.starts_with("line 3\n"), "{text}");
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let recent = Recent::default();
        recent.push(&"é".repeat(RECENT_LINE_BYTES_MAX));
        assert_eq!(recent.text().trim_end().len(), RECENT_LINE_BYTES_MAX);
        recent.push(&format!("x{}", "é".repeat(RECENT_LINE_BYTES_MAX)));
        assert_eq!(recent.text().lines().last().map(str::len), Some(RECENT_LINE_BYTES_MAX - 1));
    }

    #[test]
    fn what_the_layer_writes_is_a_line_each() {
        let recent = Recent::default();
        let kept = fmt::layer().with_ansi(false).with_target(false).with_writer(recent.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(kept), || {
            tracing::info!("one");
            tracing::warn!(cpu = 3, "two");
        });
        let text = recent.text();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("one") && text.contains("two cpu=3"), "{text}");
    }
}
