//! The line that moves while a recording runs.

use std::{
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

/// Columns of the bar.
const BAR: u32 = 30;

/// Draws on standard error, where that is a terminal.
pub(super) struct Progress {
    duration: Option<Duration>,
    is_terminal: bool,
}

impl Progress {
    /// `duration`: how long it will take, where that is known.
    pub(super) fn new(duration: Option<Duration>) -> Self {
        Self { duration, is_terminal: std::io::stderr().is_terminal() }
    }

    /// Draws the line.
    pub(super) fn show(&mut self, elapsed: Duration, samples: u64) {
        if self.is_terminal {
            // A terminal that is gone is no reason to end the recording.
            let _ = write!(std::io::stderr(), "\r\x1b[K{}", line(elapsed, self.duration, samples));
        }
    }

    /// Removes the line.
    pub(super) fn clear(&mut self) {
        if self.is_terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn line(elapsed: Duration, duration: Option<Duration>, samples: u64) -> String {
    let now = elapsed.as_secs_f64();
    let Some(duration) = duration else { return format!("recording {now:.1}s, {samples} samples") };
    let share = (now / duration.as_secs_f64()).min(1.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to BAR")]
    let full = (share * f64::from(BAR)) as usize;
    let empty = BAR as usize - full;
    format!(
        "recording [{}{}] {now:.1}s of {:.1}s, {samples} samples",
        "#".repeat(full),
        "-".repeat(empty),
        duration.as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_fills_with_time_and_never_overflows() {
        let ten = Some(Duration::from_secs(10));
        let half = line(Duration::from_secs(5), ten, 7);
        assert_eq!(half, "recording [###############---------------] 5.0s of 10.0s, 7 samples");
        assert!(line(Duration::from_secs(11), ten, 7).contains(&"#".repeat(30)));
        assert_eq!(line(Duration::from_secs(2), None, 7), "recording 2.0s, 7 samples");
    }
}
