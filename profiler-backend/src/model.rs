//! What the store holds: profiles as they were pushed, with their labels and stacks.

use std::{borrow::Cow, collections::HashMap, fmt, sync::Arc};

use profiler_pprof::push::Temporality;
use sha2::{Digest, Sha256};

use crate::stack::Stack;

/// The first 16 bytes of a SHA-256: identity by content, safe against names chosen to collide.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ContentId(pub(crate) [u8; 16]);

impl ContentId {
    pub(crate) const BYTES: usize = 16;

    pub(crate) fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Hashes fields so that no two sequences of fields feed the same bytes.
#[derive(Default)]
pub(crate) struct ContentHash(Sha256);

impl ContentHash {
    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
        self.number(text.len() as u64);
        self.0.update(text);
        self
    }

    pub(crate) fn number(&mut self, number: u64) -> &mut Self {
        self.0.update(number.to_le_bytes());
        self
    }

    pub(crate) fn id(&mut self, id: &ContentId) -> &mut Self {
        self.0.update(id.0);
        self
    }

    pub(crate) fn finish(&mut self) -> ContentId {
        let digest: [u8; 32] = self.0.finalize_reset().into();
        let (id, _) = digest.split_first_chunk().expect("a SHA-256 has 32 bytes");
        ContentId(*id)
    }
}

/// Identifies a push: a retry carries the same id.
pub(crate) type BatchId = ContentId;

/// The temporality a stored column or an answer names.
pub(crate) fn temporality_of_name(name: &str) -> Option<Temporality> {
    [Temporality::Delta, Temporality::Snapshot].into_iter().find(|t| t.name() == name)
}

/// Label names with their values, sorted by name, each name once.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Labels(Box<[(Arc<str>, Arc<str>)]>);

impl Labels {
    /// Sorts `pairs`; of a repeated name the first value stays. Empty values mean "absent" and are left out.
    pub(crate) fn new(mut pairs: Vec<(Arc<str>, Arc<str>)>) -> Self {
        pairs.retain(|(_, value)| !value.is_empty());
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        pairs.dedup_by(|later, earlier| later.0 == earlier.0);
        Self(pairs.into_boxed_slice())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(candidate, _)| (**candidate).cmp(name)).ok()?;
        self.0.get(at).map(|(_, value)| &**value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.iter().map(|(name, _)| name)
    }

    fn bytes(&self) -> usize {
        self.iter().map(|(name, value)| name.len() + value.len() + 32).sum()
    }
}

/// What identifies a run of profiles: type, temporality and series labels.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Series {
    /// Hash of everything below.
    pub(crate) id: ContentId,
    pub(crate) profile_type: Arc<str>,
    pub(crate) temporality: Temporality,
    pub(crate) labels: Labels,
}

impl Series {
    pub(crate) fn new(profile_type: Arc<str>, temporality: Temporality, labels: Labels) -> Self {
        let mut hash = ContentHash::default();
        hash.text(&profile_type).text(temporality.name());
        for (name, value) in labels.iter() {
            hash.text(name).text(value);
        }
        Self { id: hash.finish(), profile_type, temporality, labels }
    }
}

/// pprof's ValueType with its strings.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ValueType {
    pub(crate) name: Arc<str>,
    pub(crate) unit: Arc<str>,
}

/// A numeric pprof label, such as `pid`, or `bytes` with unit `bytes`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NumberLabel {
    pub(crate) name: Arc<str>,
    pub(crate) value: i64,
    /// `""` when the profile gives none.
    pub(crate) unit: Arc<str>,
}

/// Labels of a sample inside a profile.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SampleLabels {
    pub(crate) texts: Labels,
    /// Sorted by name, each once.
    pub(crate) numbers: Box<[NumberLabel]>,
}

impl SampleLabels {
    /// The value as a selector sees it; numbers in decimal, without a unit.
    pub(crate) fn get(&self, name: &str) -> Option<Cow<'_, str>> {
        if let Some(text) = self.texts.get(name) {
            return Some(Cow::Borrowed(text));
        }
        let number = self.numbers.iter().find(|label| &*label.name == name)?;
        Some(Cow::Owned(number.value.to_string()))
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        let numbers = self.numbers.iter().map(|label| &label.name);
        self.texts.names().chain(numbers)
    }

    fn bytes(&self) -> usize {
        self.texts.bytes() + self.numbers.len() * size_of::<NumberLabel>()
    }
}

/// Everything about a profile but its samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProfileHead {
    pub(crate) series: Arc<Series>,
    pub(crate) batch: BatchId,
    /// Start of the window, in Unix microseconds: what Parquet's readers agree on.
    pub(crate) start_us: i64,
    /// Length of the window, in nanoseconds; 0 for most snapshots.
    pub(crate) duration_ns: i64,
    /// In the order of `Sample::values`, at least one.
    pub(crate) sample_types: Arc<[ValueType]>,
    /// Index into `sample_types` of what is shown unless asked otherwise.
    pub(crate) default_sample_type: usize,
    pub(crate) period_type: ValueType,
    /// One sample stands for this much of `period_type`.
    pub(crate) period: i64,
    pub(crate) comments: Arc<[Arc<str>]>,
    /// Names of the labels on its samples, sorted.
    pub(crate) label_names: Arc<[Arc<str>]>,
}

/// One pushed profile.
#[derive(Debug)]
pub(crate) struct Profile {
    pub(crate) head: ProfileHead,
    pub(crate) samples: Vec<Sample>,
    /// About how much memory it takes, in bytes, with the stacks it brought.
    pub(crate) bytes: usize,
}

#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) stack: Arc<Stack>,
    pub(crate) labels: Arc<SampleLabels>,
    /// One per sample type.
    pub(crate) values: Box<[i64]>,
}

impl Profile {
    pub(crate) fn new(head: ProfileHead, samples: Vec<Sample>) -> Self {
        let bytes = 512 + head.series.labels.bytes() + samples.iter().map(Sample::bytes).sum::<usize>();
        Self { head, samples, bytes }
    }
}

impl Sample {
    /// Stacks and labels are mostly shared; counted in full here, the bound on the head errs on the safe side.
    fn bytes(&self) -> usize {
        size_of::<Self>() + 8 * self.values.len() + self.labels.bytes() + 8 * self.stack.frames.len()
    }
}

/// Hands out one `Arc<str>` for equal strings, within one decoded profile or file.
#[derive(Default)]
pub(crate) struct Strings(HashMap<Box<str>, Arc<str>>);

impl Strings {
    pub(crate) fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return Arc::clone(known);
        }
        let shared: Arc<str> = text.into();
        self.0.insert(text.into(), Arc::clone(&shared));
        shared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        Labels::new(pairs.iter().map(|&(name, value)| (name.into(), value.into())).collect())
    }

    #[test]
    fn labels_are_sorted_and_empty_values_absent() {
        let labels = labels(&[("b", "2"), ("c", ""), ("a", "1")]);
        assert_eq!(labels.iter().collect::<Vec<_>>(), [("a", "1"), ("b", "2")]);
        assert_eq!(labels.get("b"), Some("2"));
        assert_eq!(labels.get("c"), None);
    }

    #[test]
    fn the_series_id_depends_on_content_and_not_on_order() {
        let id = |profile_type: &str, temporality, pairs: &[(&str, &str)]| {
            Series::new(profile_type.into(), temporality, labels(pairs)).id
        };
        let base = id("cpu", Temporality::Delta, &[("a", "1"), ("b", "2")]);
        assert_eq!(base, id("cpu", Temporality::Delta, &[("b", "2"), ("a", "1")]));
        assert_ne!(base, id("cpu", Temporality::Snapshot, &[("a", "1"), ("b", "2")]));
        assert_ne!(base, id("heap", Temporality::Delta, &[("a", "1"), ("b", "2")]));
        assert_ne!(base, id("cpu", Temporality::Delta, &[("a", "1b"), ("", "2")]));
    }
}
