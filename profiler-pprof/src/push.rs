//! The request that carries profiles to a backend: body of `POST /api/v1/push`.
//!
//! A series is what has the same labels and the same profile type; a push holds at most one window of each.
//! Everything here has a bound, checked by [`PushRequest::validate`]: a request that breaks one will never be
//! accepted, so sending it again is useless.

use prost::Message as _;

use crate::wire;

/// Version of the messages in this module; a change that old readers would misread raises it.
pub const FORMAT_VERSION: u32 = 1;
/// Length of [`PushRequest::batch_id`].
pub const BATCH_ID_BYTES: usize = 16;
/// Longest [`PushRequest::agent`].
pub const AGENT_BYTES_MAX: usize = 256;
/// Most series in one push. A node with 500 containers and two profile types sends 1000 a window.
pub const SERIES_MAX: usize = 16_384;
/// Most labels of one series. The agent's own are 12; users add theirs.
pub const LABELS_MAX: usize = 64;
/// Longest label name.
pub const LABEL_NAME_BYTES_MAX: usize = 128;
/// Longest label value: a path (include/uapi/linux/limits.h: PATH_MAX) fits.
pub const LABEL_VALUE_BYTES_MAX: usize = 4096;
/// Longest [`Series::profile_type`].
pub const PROFILE_TYPE_BYTES_MAX: usize = 64;
/// Largest [`Series::pprof`], as sent.
pub const PPROF_BYTES_MAX: usize = 16 << 20;
/// Longest window: a day.
pub const DURATION_NS_MAX: u64 = 24 * 60 * 60 * 1_000_000_000;

/// A batch of profiles, stored as one: all of it or nothing.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PushRequest {
    /// [`FORMAT_VERSION`] of the sender.
    #[prost(uint32, tag = "1")]
    pub format_version: u32,
    /// [`BATCH_ID_BYTES`] random bytes. A retry carries the same id, and is stored at most once.
    #[prost(bytes = "vec", tag = "2")]
    pub batch_id: Vec<u8>,
    /// Sender, as `name/version`.
    #[prost(string, tag = "3")]
    pub agent: String,
    /// The profiles.
    #[prost(message, repeated, tag = "4")]
    pub series: Vec<Series>,
}

/// One profile and what it is of.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Series {
    /// Series labels: distinct names, no empty values. [`labels`] makes such a list.
    #[prost(message, repeated, tag = "1")]
    pub labels: Vec<Label>,
    /// Short name of the profile type: `cpu`, `heap`, `allocs`, ...; matches `[a-z][a-z0-9_]*`.
    #[prost(string, tag = "2")]
    pub profile_type: String,
    /// [`Temporality`] as a number.
    #[prost(uint32, tag = "3")]
    pub temporality: u32,
    /// Start of the window, in nanoseconds since the Unix epoch; positive.
    #[prost(sfixed64, tag = "4")]
    pub start_unix_ns: i64,
    /// Length of the window; 0 for a moment.
    #[prost(fixed64, tag = "5")]
    pub duration_ns: u64,
    /// The profile: profile.proto, plain or gzipped.
    #[prost(bytes = "vec", tag = "6")]
    pub pprof: Vec<u8>,
}

/// A series label.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Message)]
pub struct Label {
    /// Matches `[a-zA-Z_][a-zA-Z0-9_]*`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Never empty: an empty value and an absent label are the same thing.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// What a profile's values mean over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Temporality {
    /// What happened during the window: windows are summed.
    Delta,
    /// What was there at one moment: never summed over time.
    Snapshot,
}

impl Temporality {
    /// The number in [`Series::temporality`].
    pub const fn to_wire(self) -> u32 {
        match self {
            Self::Delta => 1,
            Self::Snapshot => 2,
        }
    }

    /// The meaning of a number in [`Series::temporality`].
    pub const fn from_wire(wire: u32) -> Option<Self> {
        match wire {
            1 => Some(Self::Delta),
            2 => Some(Self::Snapshot),
            _ => None,
        }
    }

    /// `delta` or `snapshot`, as the query API says it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Delta => "delta",
            Self::Snapshot => "snapshot",
        }
    }
}

/// Why a push is refused. The message says all of it, in one bounded line, whatever the request holds: it can be
/// the answer to the sender as it is.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The body is not a push request.
    #[error("the body is not a push request: {0}")]
    Protobuf(prost::DecodeError),
    /// The sender speaks another version.
    #[error("format_version is {found}, this side speaks {FORMAT_VERSION}")]
    FormatVersion {
        /// [`PushRequest::format_version`].
        found: u32,
    },
    /// The batch id has another length.
    #[error("batch_id has {bytes} bytes, not {BATCH_ID_BYTES}")]
    BatchId {
        /// Bytes found.
        bytes: usize,
    },
    /// The name of the agent is too long.
    #[error("agent has {bytes} bytes, more than {AGENT_BYTES_MAX}")]
    Agent {
        /// Bytes found.
        bytes: usize,
    },
    /// Too many series.
    #[error("{series} series, more than {SERIES_MAX}")]
    TooManySeries {
        /// Series found.
        series: usize,
    },
    /// One series is wrong.
    #[error("series {index}: {error}")]
    Series {
        /// Its position, from 0.
        index: usize,
        /// What is wrong with it.
        error: SeriesError,
    },
}

/// Why a series is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SeriesError {
    /// Too many labels.
    #[error("{labels} labels, more than {LABELS_MAX}")]
    TooManyLabels {
        /// Labels found.
        labels: usize,
    },
    /// A label's name is too long.
    #[error("label {index}: the name has {bytes} bytes, more than {LABEL_NAME_BYTES_MAX}")]
    LabelNameBytes {
        /// Position of the label, from 0.
        index: usize,
        /// Bytes found.
        bytes: usize,
    },
    /// A label's name holds what no selector can say.
    #[error("label {index}: the name {name:?} does not match [a-zA-Z_][a-zA-Z0-9_]*")]
    LabelName {
        /// Position of the label, from 0.
        index: usize,
        /// The name.
        name: String,
    },
    /// A label's value is empty: leave the label out.
    #[error("label {name}: the value is empty")]
    LabelValueEmpty {
        /// Name of the label.
        name: String,
    },
    /// A label's value is too long.
    #[error("label {name}: the value has {bytes} bytes, more than {LABEL_VALUE_BYTES_MAX}")]
    LabelValueBytes {
        /// Name of the label.
        name: String,
        /// Bytes found.
        bytes: usize,
    },
    /// Two labels have the same name.
    #[error("label {name} is there twice")]
    LabelTwice {
        /// The name.
        name: String,
    },
    /// The profile type is too long.
    #[error("profile_type has {bytes} bytes, more than {PROFILE_TYPE_BYTES_MAX}")]
    ProfileTypeBytes {
        /// Bytes found.
        bytes: usize,
    },
    /// The profile type is not a short name.
    #[error("profile_type {name:?} does not match [a-z][a-z0-9_]*")]
    ProfileType {
        /// The profile type.
        name: String,
    },
    /// Neither delta nor snapshot.
    #[error("temporality is {found}, not 1 (delta) or 2 (snapshot)")]
    Temporality {
        /// The number.
        found: u32,
    },
    /// The window starts at or before the epoch, or ends after the year 2262.
    #[error("the window of {duration_ns} ns from {start_unix_ns} is outside 1970 to 2262")]
    Window {
        /// [`Series::start_unix_ns`].
        start_unix_ns: i64,
        /// [`Series::duration_ns`].
        duration_ns: u64,
    },
    /// The window is too long.
    #[error("duration_ns is {duration_ns}, more than {DURATION_NS_MAX}")]
    Duration {
        /// [`Series::duration_ns`].
        duration_ns: u64,
    },
    /// There is no profile.
    #[error("pprof is empty")]
    PprofEmpty,
    /// The profile is too large.
    #[error("pprof has {bytes} bytes, more than {PPROF_BYTES_MAX}")]
    PprofBytes {
        /// Bytes found.
        bytes: usize,
    },
}

/// Series labels from pairs: sorted by name, empty values left out.
pub fn labels<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<Label> {
    let present = pairs.into_iter().filter(|(_, value)| !value.is_empty());
    let mut labels: Vec<Label> =
        present.map(|(name, value)| Label { name: name.to_owned(), value: value.to_owned() }).collect();
    labels.sort_unstable();
    labels
}

/// Can a selector name this label? `[a-zA-Z_][a-zA-Z0-9_]*`.
pub fn is_label_name(name: &str) -> bool {
    let is_first = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
    match name.as_bytes() {
        [first, rest @ ..] => is_first(*first) && rest.iter().all(|&b| is_first(b) || b.is_ascii_digit()),
        [] => false,
    }
}

/// Is it the short name of a profile type? `[a-z][a-z0-9_]*`.
pub fn is_profile_type(name: &str) -> bool {
    match name.as_bytes() {
        [first, rest @ ..] => {
            let is_rest = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'_';
            first.is_ascii_lowercase() && rest.iter().all(is_rest)
        }
        [] => false,
    }
}

impl PushRequest {
    /// The request as protobuf. Compressing it is the transport's part.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// Reads and validates a request. The profiles in it are not looked into.
    ///
    /// The caller bounds `bytes`. What is read takes about as much memory again, besides the lists of series and
    /// labels, which are counted before they are built.
    ///
    /// # Errors
    /// For bytes that are no request, and for a request that [`PushRequest::validate`] refuses.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, PushError> {
        count_entries(bytes)?;
        let request = Self::decode(bytes).map_err(PushError::Protobuf)?;
        request.validate()?;
        Ok(request)
    }

    /// Checks every bound of this module, and that label names are distinct within a series.
    ///
    /// # Errors
    /// The first bound broken.
    pub fn validate(&self) -> Result<(), PushError> {
        let Self { format_version, batch_id, agent, series } = self;
        if *format_version != FORMAT_VERSION {
            return Err(PushError::FormatVersion { found: *format_version });
        }
        if batch_id.len() != BATCH_ID_BYTES {
            return Err(PushError::BatchId { bytes: batch_id.len() });
        }
        if agent.len() > AGENT_BYTES_MAX {
            return Err(PushError::Agent { bytes: agent.len() });
        }
        if series.len() > SERIES_MAX {
            return Err(PushError::TooManySeries { series: series.len() });
        }
        for (index, series) in series.iter().enumerate() {
            series.validate().map_err(|error| PushError::Series { index, error })?;
        }
        Ok(())
    }
}

impl Series {
    /// Checks every bound of a series, and that its label names are distinct.
    ///
    /// # Errors
    /// The first bound broken.
    pub fn validate(&self) -> Result<(), SeriesError> {
        let Self { labels, profile_type, temporality, start_unix_ns, duration_ns, pprof } = self;
        validate_labels(labels)?;
        validate_profile_type(profile_type)?;
        if Temporality::from_wire(*temporality).is_none() {
            return Err(SeriesError::Temporality { found: *temporality });
        }
        validate_window(*start_unix_ns, *duration_ns)?;
        match pprof.len() {
            0 => Err(SeriesError::PprofEmpty),
            1..=PPROF_BYTES_MAX => Ok(()),
            bytes => Err(SeriesError::PprofBytes { bytes }),
        }
    }
}

/// Refuses too many series and labels while they are still bytes: a label of two bytes becomes 48.
fn count_entries(request: &[u8]) -> Result<(), PushError> {
    const SERIES_TAG: u32 = 4;
    const LABELS_TAG: u32 = 1;
    let with_tag = |bytes, tag| wire::fields(bytes).filter(move |field| field.tag == tag);
    let series = with_tag(request, SERIES_TAG).count();
    if series > SERIES_MAX {
        return Err(PushError::TooManySeries { series });
    }
    for (index, series) in with_tag(request, SERIES_TAG).enumerate() {
        let labels = with_tag(series.payload, LABELS_TAG).count();
        validate_label_count(labels).map_err(|error| PushError::Series { index, error })?;
    }
    Ok(())
}

fn validate_label_count(labels: usize) -> Result<(), SeriesError> {
    if labels > LABELS_MAX { Err(SeriesError::TooManyLabels { labels }) } else { Ok(()) }
}

fn validate_labels(labels: &[Label]) -> Result<(), SeriesError> {
    validate_label_count(labels.len())?;
    for (index, label) in labels.iter().enumerate() {
        validate_label(index, label)?;
    }
    let mut names: Vec<&str> = labels.iter().map(|label| label.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(SeriesError::LabelTwice { name: pair[0].to_owned() }),
        None => Ok(()),
    }
}

fn validate_label(index: usize, label: &Label) -> Result<(), SeriesError> {
    let Label { name, value } = label;
    if name.len() > LABEL_NAME_BYTES_MAX {
        return Err(SeriesError::LabelNameBytes { index, bytes: name.len() });
    }
    if !is_label_name(name) {
        return Err(SeriesError::LabelName { index, name: name.clone() });
    }
    match value.len() {
        0 => Err(SeriesError::LabelValueEmpty { name: name.clone() }),
        1..=LABEL_VALUE_BYTES_MAX => Ok(()),
        bytes => Err(SeriesError::LabelValueBytes { name: name.clone(), bytes }),
    }
}

fn validate_profile_type(name: &str) -> Result<(), SeriesError> {
    if name.len() > PROFILE_TYPE_BYTES_MAX {
        return Err(SeriesError::ProfileTypeBytes { bytes: name.len() });
    }
    if is_profile_type(name) { Ok(()) } else { Err(SeriesError::ProfileType { name: name.to_owned() }) }
}

fn validate_window(start_unix_ns: i64, duration_ns: u64) -> Result<(), SeriesError> {
    if duration_ns > DURATION_NS_MAX {
        return Err(SeriesError::Duration { duration_ns });
    }
    let end = start_unix_ns.checked_add_unsigned(duration_ns);
    if start_unix_ns <= 0 || end.is_none() {
        return Err(SeriesError::Window { start_unix_ns, duration_ns });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series() -> Series {
        Series {
            labels: labels([("node", "n1"), ("container", "cart"), ("pod", "")]),
            profile_type: "cpu".to_owned(),
            temporality: Temporality::Delta.to_wire(),
            start_unix_ns: 1_700_000_000_000_000_000,
            duration_ns: 10_000_000_000,
            pprof: vec![1],
        }
    }

    fn request(series: Vec<Series>) -> PushRequest {
        PushRequest {
            format_version: FORMAT_VERSION,
            batch_id: vec![7; BATCH_ID_BYTES],
            agent: "profiler-agent/0.1.0".to_owned(),
            series,
        }
    }

    /// Breaks the second of two series, and expects to be told so by the sender's side and by the receiver's.
    #[track_caller]
    fn check_series(break_it: impl FnOnce(&mut Series), expect: &str) {
        let mut broken = series();
        break_it(&mut broken);
        check(&request(vec![series(), broken]), &format!("series 1: {expect}"));
    }

    #[track_caller]
    fn check(request: &PushRequest, expect: &str) {
        assert_eq!(request.validate().expect_err("must be refused").to_string(), expect);
        let received = PushRequest::from_bytes(&request.to_bytes());
        assert_eq!(received.expect_err("must be refused").to_string(), expect);
    }

    fn label(name: &str, value: &str) -> Label {
        Label { name: name.to_owned(), value: value.to_owned() }
    }

    #[test]
    fn a_request_survives_the_wire() {
        let sent = request(vec![series(), series()]);
        assert_eq!(PushRequest::from_bytes(&sent.to_bytes()).unwrap(), sent);
    }

    #[test]
    fn labels_are_sorted_and_empty_values_left_out() {
        assert_eq!(series().labels, [label("container", "cart"), label("node", "n1")]);
    }

    #[test]
    fn the_fields_have_the_numbers_and_wire_types_of_the_contract() {
        let bytes = request(vec![Series { labels: vec![label("a", "b")], ..series() }]).to_bytes();
        let mut expect = vec![0x08, 1, 0x12, 16];
        expect.extend([7; 16]);
        expect.extend([0x1a, 20]);
        expect.extend(b"profiler-agent/0.1.0");
        expect.extend([0x22, 36, 0x0a, 6, 0x0a, 1, b'a', 0x12, 1, b'b', 0x12, 3]);
        expect.extend(b"cpu");
        expect.extend([0x18, 1, 0x21]);
        expect.extend(1_700_000_000_000_000_000_i64.to_le_bytes());
        expect.push(0x29);
        expect.extend(10_000_000_000_u64.to_le_bytes());
        expect.extend([0x32, 1, 1]);
        assert_eq!(bytes, expect);
    }

    #[test]
    fn a_request_outside_its_bounds_is_refused() {
        let check = |break_it: fn(&mut PushRequest), expect: &str| {
            let mut broken = request(vec![series()]);
            break_it(&mut broken);
            check(&broken, expect);
        };
        check(|r| r.format_version = 2, "format_version is 2, this side speaks 1");
        check(|r| r.batch_id.truncate(15), "batch_id has 15 bytes, not 16");
        check(|r| r.agent = "a".repeat(257), "agent has 257 bytes, more than 256");
        check(|r| r.series = vec![Series::default(); 16_385], "16385 series, more than 16384");
    }

    #[test]
    fn labels_outside_their_bounds_are_refused() {
        let check = |labels: Vec<Label>, expect: &str| check_series(|s| s.labels = labels, expect);
        check(vec![label("a", "b"); 65], "65 labels, more than 64");
        let long = "a".repeat(129);
        check(vec![label(&long, "b")], "label 0: the name has 129 bytes, more than 128");
        for name in ["", "1a", "a-b", "a b", "\u{e9}", "a\nb"] {
            let expect = format!("label 1: the name {name:?} does not match [a-zA-Z_][a-zA-Z0-9_]*");
            check(vec![label("a", "b"), label(name, "c")], &expect);
        }
        check(vec![label("a", "")], "label a: the value is empty");
        check(vec![label("a", &"b".repeat(4097))], "label a: the value has 4097 bytes, more than 4096");
        check(vec![label("a", "1"), label("b", "2"), label("a", "3")], "label a is there twice");
    }

    #[test]
    fn what_lies_on_a_bound_is_accepted() {
        let name = |i: usize| format!("l{i:0127}");
        let labels = (0..LABELS_MAX).map(|i| label(&name(i), &"v".repeat(LABEL_VALUE_BYTES_MAX))).collect();
        let profile_type = "c".repeat(PROFILE_TYPE_BYTES_MAX);
        let most = Series { labels, profile_type, duration_ns: DURATION_NS_MAX, ..series() };
        assert_eq!(most.validate(), Ok(()));
        let least = Series { labels: vec![], duration_ns: 0, start_unix_ns: 1, ..series() };
        assert_eq!(least.validate(), Ok(()));
    }

    #[test]
    fn a_profile_outside_its_bounds_is_refused() {
        for name in ["", "Cpu", "cpu-x", "1cpu"] {
            let expect = format!("profile_type {name:?} does not match [a-z][a-z0-9_]*");
            check_series(|s| s.profile_type = name.to_owned(), &expect);
        }
        check_series(|s| s.profile_type = "c".repeat(65), "profile_type has 65 bytes, more than 64");
        check_series(|s| s.temporality = 0, "temporality is 0, not 1 (delta) or 2 (snapshot)");
        check_series(|s| s.start_unix_ns = 0, "the window of 10000000000 ns from 0 is outside 1970 to 2262");
        check_series(
            |s| s.start_unix_ns = i64::MAX,
            "the window of 10000000000 ns from 9223372036854775807 is outside 1970 to 2262",
        );
        check_series(
            |s| s.duration_ns = DURATION_NS_MAX + 1,
            "duration_ns is 86400000000001, more than 86400000000000",
        );
        check_series(|s| s.pprof.clear(), "pprof is empty");
        check_series(
            |s| s.pprof = vec![0; PPROF_BYTES_MAX + 1],
            "pprof has 16777217 bytes, more than 16777216",
        );
    }

    #[test]
    fn bytes_that_are_no_request_are_refused_in_one_line() {
        let error = PushRequest::from_bytes(b"hello\nworld").expect_err("must be refused").to_string();
        assert!(error.starts_with("the body is not a push request: "), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
