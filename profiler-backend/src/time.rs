//! Points in time as a query writes them: RFC 3339, Unix milliseconds, `now`, `now-1h30m`.

use chrono::DateTime;

/// Latest time that is understood: the year 9999, in Unix milliseconds. Keeps every later sum inside an `i64`.
const UNIX_MS_MAX: i64 = 253_402_300_799_999;

/// What is accepted, for error messages.
pub(crate) const ACCEPTED: &str = "RFC 3339, Unix milliseconds, now or now-1h30m (units ms, s, m, h, d, w)";

/// Reads a point in time as Unix milliseconds; `None` when `text` is none of what [`ACCEPTED`] names.
pub(crate) fn parse_time(text: &str, now_ms: i64) -> Option<i64> {
    let unix_ms = if let Some(offset) = text.strip_prefix("now") {
        parse_now_offset(offset, now_ms)?
    } else if let Ok(unix_ms) = text.parse::<i64>() {
        unix_ms
    } else {
        DateTime::parse_from_rfc3339(text).ok()?.timestamp_millis()
    };
    (0..=UNIX_MS_MAX).contains(&unix_ms).then_some(unix_ms)
}

fn parse_now_offset(offset: &str, now_ms: i64) -> Option<i64> {
    if offset.is_empty() {
        return Some(now_ms);
    }
    let (sign, duration) = match offset.split_at_checked(1)? {
        ("-", rest) => (-1, rest),
        // A plus in a URL that was not escaped arrives as a space.
        ("+" | " ", rest) => (1, rest),
        _ => return None,
    };
    now_ms.checked_add(sign * parse_duration_ms(duration)?)
}

/// Reads a duration such as `90s`, `1h30m` or `7d` as milliseconds, at least 0; `None` without a unit.
pub(crate) fn parse_duration_ms(text: &str) -> Option<i64> {
    let mut rest = text;
    let mut total: i64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, after) = rest.split_at_checked(digits)?;
        let unit = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at_checked(unit)?;
        let unit_ms = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            "w" => 604_800_000,
            _ => return None,
        };
        total = total.checked_add(number.parse::<i64>().ok()?.checked_mul(unit_ms)?)?;
        rest = after;
    }
    (!text.is_empty() && total <= UNIX_MS_MAX).then_some(total)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW_MS: i64 = 1_795_000_000_000;

    #[track_caller]
    fn check(text: &str, expect: Option<i64>) {
        assert_eq!(parse_time(text, NOW_MS), expect, "for {text:?}");
    }

    #[test]
    fn every_accepted_form_is_read() {
        check("now", Some(NOW_MS));
        check("now-1h", Some(NOW_MS - 3_600_000));
        check("now-1h30m", Some(NOW_MS - 5_400_000));
        check("now+250ms", Some(NOW_MS + 250));
        check("1795000000000", Some(NOW_MS));
        check("2026-11-21T10:00:00Z", Some(1_795_255_200_000));
        check("2026-11-21T12:00:00.5+02:00", Some(1_795_255_200_500));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in
            ["", "yesterday", "now-", "now-1", "now-h", "now1h", "-1", "2026-11-21", "now-99999999999w"]
        {
            check(text, None);
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration_ms("7d"), Some(604_800_000));
        assert_eq!(parse_duration_ms("10s"), Some(10_000));
        assert_eq!(parse_duration_ms("10"), None);
        assert_eq!(parse_duration_ms(""), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in any::<String>(), now in any::<i64>()) {
            let _ = parse_time(&text, now);
            let _ = parse_time(&format!("now-{text}"), now);
        }
    }
}
