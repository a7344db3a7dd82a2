//! The columns of each table, and their typed views in a batch that was read.
//!
//! Types are those all engines share: microsecond UTC timestamps, 64-bit signed integers, 16-byte ids, dictionary
//! encoded strings, a map of strings for labels without a column. An absent label is `''`.

use std::sync::Arc;

use arrow_array::{
    Array, ArrayRef, BooleanArray, DictionaryArray, FixedSizeBinaryArray, ListArray, MapArray, RecordBatch,
    StringArray,
    builder::{MapBuilder, StringBuilder, StringDictionaryBuilder},
    cast::AsArray,
    types::{Int32Type, Int64Type, TimestampMicrosecondType},
};

use crate::model::{ContentId, Labels};

pub(crate) const TS: &str = "ts";
pub(crate) const DURATION_MS: &str = "duration_ms";
pub(crate) const DURATION_NS: &str = "duration_ns";
pub(crate) const PROFILE_TYPE: &str = "profile_type";
pub(crate) const TEMPORALITY: &str = "temporality";
pub(crate) const SERIES_ID: &str = "series_id";
pub(crate) const LABELS: &str = "labels";
pub(crate) const SAMPLE_TYPE: &str = "sample_type";
pub(crate) const SAMPLE_UNIT: &str = "sample_unit";
pub(crate) const PID: &str = "pid";
pub(crate) const SAMPLE_LABELS: &str = "sample_labels";
pub(crate) const NUMBER_LABELS: &str = "number_labels";
pub(crate) const STACK_ID: &str = "stack_id";
pub(crate) const VALUE: &str = "value";
pub(crate) const BATCH_ID: &str = "batch_id";
pub(crate) const SAMPLE_TYPES: &str = "sample_types";
pub(crate) const DEFAULT_SAMPLE_TYPE: &str = "default_sample_type";
pub(crate) const PERIOD_TYPE: &str = "period_type";
pub(crate) const PERIOD: &str = "period";
pub(crate) const COMMENTS: &str = "comments";
pub(crate) const LABEL_NAMES: &str = "sample_label_names";
pub(crate) const SAMPLES: &str = "samples";
pub(crate) const FRAMES: &str = "frames";
pub(crate) const FRAME_ID: &str = "frame_id";
pub(crate) const KIND: &str = "kind";
pub(crate) const INLINED: &str = "inlined";
pub(crate) const FUNCTION: &str = "function";
pub(crate) const SYSTEM_NAME: &str = "system_name";
pub(crate) const FILE: &str = "file";
pub(crate) const START_LINE: &str = "start_line";
pub(crate) const LINE: &str = "line";
pub(crate) const COLUMN: &str = "column";
pub(crate) const ADDRESS: &str = "address";
pub(crate) const BINARY: &str = "binary";
pub(crate) const BUILD_ID: &str = "build_id";

/// Series labels with a column of their own; all others are in the map `labels`.
pub(crate) const SERIES_LABELS: [&str; 12] = [
    "node",
    "cluster",
    "namespace",
    "workload",
    "pod",
    "container",
    "container_id",
    "service_name",
    "service_version",
    "image",
    "unit",
    "exe",
];

/// Text labels of samples with a column of their own; all others are in the map `sample_labels`.
pub(crate) const TEXT_LABELS: [&str; 2] = ["comm", "thread_name"];

/// The column rows are clustered by first within a profile type.
pub(crate) const CLUSTER_LABEL: &str = "container";

/// A file's columns are not what this program writes.
#[derive(Debug, thiserror::Error)]
#[error("column {column}: {problem}")]
pub(crate) struct ColumnError {
    column: String,
    problem: &'static str,
}

impl ColumnError {
    pub(crate) fn new(column: &str, problem: &'static str) -> Self {
        Self { column: column.to_owned(), problem }
    }
}

fn column<'a, T>(
    batch: &'a RecordBatch,
    name: &str,
    view: impl FnOnce(&'a ArrayRef) -> Option<T>,
) -> Result<T, ColumnError> {
    let array = batch.column_by_name(name).ok_or_else(|| ColumnError::new(name, "missing"))?;
    view(array).ok_or_else(|| ColumnError::new(name, "has another type"))
}

/// A column of strings.
pub(crate) struct Texts<'a> {
    keys: &'a [i32],
    values: &'a StringArray,
}

impl<'a> Texts<'a> {
    pub(crate) fn of(batch: &'a RecordBatch, name: &str) -> Result<Self, ColumnError> {
        column(batch, name, |array| {
            let dictionary: &DictionaryArray<Int32Type> = array.as_dictionary_opt()?;
            let values = dictionary.values().as_string_opt()?;
            Some(Self { keys: dictionary.keys().values(), values })
        })
    }

    /// The string of a row of the batch; `""` where there is none.
    pub(crate) fn get(&self, row: usize) -> &'a str {
        let key = self.keys.get(row).and_then(|&key| usize::try_from(key).ok());
        key.filter(|&key| key < self.values.len()).map_or("", |key| self.values.value(key))
    }
}

/// A column of 16-byte ids.
pub(crate) struct Ids<'a>(&'a FixedSizeBinaryArray);

impl<'a> Ids<'a> {
    pub(crate) fn of(batch: &'a RecordBatch, name: &str) -> Result<Self, ColumnError> {
        column(batch, name, |array| Self::over(array))
    }

    fn over(array: &'a dyn Array) -> Option<Self> {
        let ids = array.as_fixed_size_binary_opt()?;
        (ids.value_length() as usize == ContentId::BYTES).then_some(Self(ids))
    }

    pub(crate) fn get(&self, row: usize) -> ContentId {
        ContentId::from_slice(self.0.value(row)).expect("the width is checked in `over`")
    }
}

/// A column of integers without nulls.
pub(crate) fn integers<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a [i64], ColumnError> {
    column(batch, name, |array| Some(&**array.as_primitive_opt::<Int64Type>()?.values()))
}

/// A column of 32-bit integers without nulls.
pub(crate) fn small_integers<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a [i32], ColumnError> {
    column(batch, name, |array| Some(&**array.as_primitive_opt::<Int32Type>()?.values()))
}

/// A column of timestamps, in Unix microseconds.
pub(crate) fn timestamps<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a [i64], ColumnError> {
    column(batch, name, |array| Some(&**array.as_primitive_opt::<TimestampMicrosecondType>()?.values()))
}

pub(crate) fn booleans<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a BooleanArray, ColumnError> {
    column(batch, name, |array| array.as_boolean_opt())
}

/// A column of integers that may be absent.
pub(crate) struct OptionalIntegers<'a>(&'a arrow_array::Int64Array);

impl<'a> OptionalIntegers<'a> {
    pub(crate) fn of(batch: &'a RecordBatch, name: &str) -> Result<Self, ColumnError> {
        column(batch, name, |array| array.as_primitive_opt::<Int64Type>().map(Self))
    }

    pub(crate) fn get(&self, row: usize) -> Option<i64> {
        self.0.is_valid(row).then(|| self.0.value(row))
    }
}

/// A column of maps from string to string.
pub(crate) struct Maps<'a> {
    maps: &'a MapArray,
    keys: &'a StringArray,
    values: &'a StringArray,
}

impl<'a> Maps<'a> {
    pub(crate) fn of(batch: &'a RecordBatch, name: &str) -> Result<Self, ColumnError> {
        column(batch, name, |array| {
            let maps = array.as_map_opt()?;
            let (keys, values) = (maps.keys().as_string_opt()?, maps.values().as_string_opt()?);
            Some(Self { maps, keys, values })
        })
    }

    pub(crate) fn row(&self, row: usize) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let offsets = self.maps.value_offsets();
        let bound = |at: usize| offsets.get(at).and_then(|&offset| usize::try_from(offset).ok());
        let (start, end) = (bound(row).unwrap_or(0), bound(row + 1).unwrap_or(0));
        let (keys, values) = (self.keys, self.values);
        (start..end.min(keys.len()).min(values.len())).map(|at| (keys.value(at), values.value(at)))
    }
}

/// A column of lists of ids.
pub(crate) struct IdLists<'a> {
    lists: &'a ListArray,
    ids: Ids<'a>,
}

impl<'a> IdLists<'a> {
    pub(crate) fn of(batch: &'a RecordBatch, name: &str) -> Result<Self, ColumnError> {
        column(batch, name, |array| {
            let lists = array.as_list_opt()?;
            Some(Self { lists, ids: Ids::over(lists.values())? })
        })
    }

    pub(crate) fn row(&self, row: usize) -> impl Iterator<Item = ContentId> {
        let offsets = self.lists.value_offsets();
        let bound = |at: usize| offsets.get(at).and_then(|&offset| usize::try_from(offset).ok());
        let (start, end) = (bound(row).unwrap_or(0), bound(row + 1).unwrap_or(0));
        (start..end.min(self.ids.0.len())).map(|at| self.ids.get(at))
    }
}

/// Builds a column of strings.
pub(crate) fn text_array<'a>(texts: impl Iterator<Item = &'a str>) -> ArrayRef {
    let mut builder = StringDictionaryBuilder::<Int32Type>::new();
    texts.for_each(|text| builder.append_value(text));
    Arc::new(builder.finish())
}

/// Builds a column of maps; each row is a list of pairs.
pub(crate) fn map_array<R, K, V>(rows: impl Iterator<Item = R>) -> ArrayRef
where
    R: IntoIterator<Item = (K, V)>,
    K: AsRef<str>,
    V: AsRef<str>,
{
    let mut builder = MapBuilder::new(None, StringBuilder::new(), StringBuilder::new());
    for row in rows {
        for (key, value) in row {
            builder.keys().append_value(key);
            builder.values().append_value(value);
        }
        builder.append(true).expect("each key got a value");
    }
    Arc::new(builder.finish())
}

/// Builds a column of ids.
pub(crate) fn id_array(ids: impl ExactSizeIterator<Item = ContentId>) -> ArrayRef {
    const WIDTH: i32 = ContentId::BYTES as i32;
    let mut builder = arrow_array::builder::FixedSizeBinaryBuilder::with_capacity(ids.len(), WIDTH);
    ids.for_each(|id| builder.append_value(id.0).expect("an id has the column's width"));
    Arc::new(builder.finish())
}

/// Series labels without a column of their own.
pub(crate) fn other_series_labels(labels: &Labels) -> impl Iterator<Item = (&str, &str)> {
    labels.iter().filter(|(name, _)| !SERIES_LABELS.contains(name))
}

/// Text labels of a sample without a column of their own.
pub(crate) fn other_text_labels(labels: &Labels) -> impl Iterator<Item = (&str, &str)> {
    labels.iter().filter(|(name, _)| !TEXT_LABELS.contains(name))
}
