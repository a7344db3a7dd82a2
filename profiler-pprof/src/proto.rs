//! The messages of google/pprof `proto/profile.proto`, field by field, written by hand for prost.
//!
//! String fields of the format are indices into [`Profile::string_table`]; an index of 0 means "not set".
//! Ids are positions: what [`crate::ProfileBuilder`] makes and [`crate::check()`] demands is that mapping,
//! location and function `i` of their tables have id `i + 1`; the lookups of [`Profile`] build on that.

use crate::FrameKind;

/// A set of samples and the tables they refer to. profile.proto: Profile.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Profile {
    /// What each entry of [`Sample::value`] measures, in the same order.
    #[prost(message, repeated, tag = "1")]
    pub sample_type: Vec<ValueType>,
    /// The samples.
    #[prost(message, repeated, tag = "2")]
    pub sample: Vec<Sample>,
    /// Address ranges and the files behind them; the first is the main binary.
    #[prost(message, repeated, tag = "3")]
    pub mapping: Vec<Mapping>,
    /// Code addresses that samples refer to.
    #[prost(message, repeated, tag = "4")]
    pub location: Vec<Location>,
    /// Functions that lines refer to.
    #[prost(message, repeated, tag = "5")]
    pub function: Vec<Function>,
    /// Every string, once; the first is empty.
    #[prost(string, repeated, tag = "6")]
    pub string_table: Vec<String>,
    /// String: an anchored regular expression; a reader drops frames of matching functions and what they call.
    #[prost(int64, tag = "7")]
    pub drop_frames: i64,
    /// String: an anchored regular expression; frames a reader keeps in spite of `drop_frames`.
    #[prost(int64, tag = "8")]
    pub keep_frames: i64,
    /// Start of the collection, in nanoseconds since the Unix epoch; 0 when unknown.
    #[prost(int64, tag = "9")]
    pub time_nanos: i64,
    /// Length of the collection in nanoseconds; 0 where a duration makes no sense.
    #[prost(int64, tag = "10")]
    pub duration_nanos: i64,
    /// What is counted between two samples.
    #[prost(message, optional, tag = "11")]
    pub period_type: Option<ValueType>,
    /// How much of `period_type` lies between two samples: 1e9/Hz for a clock in nanoseconds.
    #[prost(int64, tag = "12")]
    pub period: i64,
    /// Strings: free text, shown at the top of reports.
    #[prost(int64, repeated, tag = "13")]
    pub comment: Vec<i64>,
    /// String: type of the value to show first; when 0, readers take the last sample type.
    #[prost(int64, tag = "14")]
    pub default_sample_type: i64,
    /// String: an absolute URL that explains the profile.
    #[prost(int64, tag = "15")]
    pub doc_url: i64,
}

/// Name and unit of a value. profile.proto: ValueType.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct ValueType {
    /// String: `cpu`, `samples`, `inuse_space`, ...
    #[prost(int64, tag = "1")]
    pub r#type: i64,
    /// String: `nanoseconds`, `count`, `bytes`, ...
    #[prost(int64, tag = "2")]
    pub unit: i64,
}

/// The values of one stack under one set of labels. profile.proto: Sample.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Sample {
    /// Ids of locations, leaf first.
    #[prost(uint64, repeated, tag = "1")]
    pub location_id: Vec<u64>,
    /// One value per [`Profile::sample_type`].
    #[prost(int64, repeated, tag = "2")]
    pub value: Vec<i64>,
    /// What else is known about the sample.
    #[prost(message, repeated, tag = "3")]
    pub label: Vec<Label>,
}

/// A key with a string or a number. profile.proto: Label.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Label {
    /// String: the key, never empty.
    #[prost(int64, tag = "1")]
    pub key: i64,
    /// String: the value of a string label; 0 for a number.
    #[prost(int64, tag = "2")]
    pub str: i64,
    /// The value of a numeric label; 0 for a string.
    #[prost(int64, tag = "3")]
    pub num: i64,
    /// String: unit of `num`; 0 leaves the reader to guess.
    #[prost(int64, tag = "4")]
    pub num_unit: i64,
}

/// An address range and the file behind it. profile.proto: Mapping.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Mapping {
    /// Position in [`Profile::mapping`], plus 1.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// First address of the range.
    #[prost(uint64, tag = "2")]
    pub memory_start: u64,
    /// End of the range, exclusive.
    #[prost(uint64, tag = "3")]
    pub memory_limit: u64,
    /// Byte of the file that lies at `memory_start`.
    #[prost(uint64, tag = "4")]
    pub file_offset: u64,
    /// String: path of the file, or a name in brackets such as `[vdso]`.
    #[prost(int64, tag = "5")]
    pub filename: i64,
    /// String: identity of the file's content, for ELF the GNU build id in hexadecimal.
    #[prost(int64, tag = "6")]
    pub build_id: i64,
    /// Functions are resolved: `go tool pprof` will not look for symbols itself.
    #[prost(bool, tag = "7")]
    pub has_functions: bool,
    /// Source files are resolved.
    #[prost(bool, tag = "8")]
    pub has_filenames: bool,
    /// Source lines are resolved.
    #[prost(bool, tag = "9")]
    pub has_line_numbers: bool,
    /// Inlined calls are resolved.
    #[prost(bool, tag = "10")]
    pub has_inline_frames: bool,
}

/// One code address and what lies there. profile.proto: Location.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Location {
    /// Position in [`Profile::location`], plus 1.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Id of the mapping; 0 when unknown.
    #[prost(uint64, tag = "2")]
    pub mapping_id: u64,
    /// The address, inside the mapping's range; a caller's address lies inside its call instruction.
    #[prost(uint64, tag = "3")]
    pub address: u64,
    /// The source lines at the address, one per inlined call, innermost first; empty when unresolved.
    #[prost(message, repeated, tag = "4")]
    pub line: Vec<Line>,
    /// Several symbols share the address (identical code folding); the lines name one of them.
    #[prost(bool, tag = "5")]
    pub is_folded: bool,
    /// [`FrameKind`] as a number, not part of profile.proto; see [`Profile::kind`].
    #[prost(uint32, tag = "1000")]
    pub kind: u32,
}

/// A place in a function's source. profile.proto: Line.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Line {
    /// Id of the function.
    #[prost(uint64, tag = "1")]
    pub function_id: u64,
    /// Line in the function's file, from 1; 0 when unknown.
    #[prost(int64, tag = "2")]
    pub line: i64,
    /// Column of the line, from 1; 0 when unknown.
    #[prost(int64, tag = "3")]
    pub column: i64,
}

/// A function. profile.proto: Function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Function {
    /// Position in [`Profile::function`], plus 1.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// String: the name people know, demangled.
    #[prost(int64, tag = "2")]
    pub name: i64,
    /// String: the name the linker knows, mangled.
    #[prost(int64, tag = "3")]
    pub system_name: i64,
    /// String: path of the source file.
    #[prost(int64, tag = "4")]
    pub filename: i64,
    /// First line of the function, from 1; 0 when unknown.
    #[prost(int64, tag = "5")]
    pub start_line: i64,
}

impl Profile {
    /// The string at `index` of the string table; `None` when there is none.
    pub fn string(&self, index: i64) -> Option<&str> {
        self.string_table.get(usize::try_from(index).ok()?).map(String::as_str)
    }

    /// The mapping with this id; `None` for 0 and for an id outside the table.
    pub fn mapping(&self, id: u64) -> Option<&Mapping> {
        by_id(&self.mapping, id)
    }

    /// The location with this id; `None` for 0 and for an id outside the table.
    pub fn location(&self, id: u64) -> Option<&Location> {
        by_id(&self.location, id)
    }

    /// The function with this id; `None` for 0 and for an id outside the table.
    pub fn function(&self, id: u64) -> Option<&Function> {
        by_id(&self.function, id)
    }

    /// The kind of a location: as stated, else as its mapping suggests. Never
    /// [`FrameKind::Unspecified`].
    pub fn kind(&self, location: &Location) -> FrameKind {
        match FrameKind::from_wire(location.kind) {
            None | Some(FrameKind::Unspecified) => {
                let filename = self.mapping(location.mapping_id).and_then(|m| self.string(m.filename));
                FrameKind::of_mapping(filename.unwrap_or(""))
            }
            Some(kind) => kind,
        }
    }

    /// Position of the sample type with this name.
    pub fn sample_type_index(&self, name: &str) -> Option<usize> {
        self.sample_type.iter().position(|t| self.string(t.r#type) == Some(name))
    }

    /// Position of the sample type to show first: the default one, else the last, as `go tool pprof` chooses.
    /// `None` when there are no sample types.
    pub fn default_sample_type_index(&self) -> Option<usize> {
        let stated = self.string(self.default_sample_type).filter(|name| !name.is_empty());
        stated.and_then(|name| self.sample_type_index(name)).or_else(|| self.sample_type.len().checked_sub(1))
    }
}

/// The entry whose id is its position plus 1.
fn by_id<T>(table: &[T], id: u64) -> Option<&T> {
    table.get(usize::try_from(id.checked_sub(1)?).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(strings: &[&str]) -> Vec<String> {
        strings.iter().map(|&s| s.to_owned()).collect()
    }

    #[test]
    fn ids_start_at_one_and_end_with_the_table() {
        let profile =
            Profile { function: vec![Function { id: 1, ..Default::default() }], ..Default::default() };
        assert_eq!(profile.function(0), None);
        assert_eq!(profile.function(1).map(|f| f.id), Some(1));
        assert_eq!(profile.function(2), None);
        assert_eq!(profile.function(u64::MAX), None);
    }

    #[test]
    fn a_string_outside_the_table_is_none() {
        let profile = Profile { string_table: strings(&["", "a"]), ..Default::default() };
        assert_eq!(profile.string(1), Some("a"));
        assert_eq!(profile.string(2), None);
        assert_eq!(profile.string(-1), None);
    }

    #[test]
    fn a_stated_kind_wins_and_an_unknown_one_falls_back_to_the_mapping() {
        let profile = Profile {
            string_table: strings(&["", "[kernel.kallsyms]"]),
            mapping: vec![Mapping { id: 1, filename: 1, ..Default::default() }],
            ..Default::default()
        };
        let kind = |kind, mapping_id| profile.kind(&Location { kind, mapping_id, ..Default::default() });
        assert_eq!(kind(FrameKind::Marker.to_wire(), 1), FrameKind::Marker);
        assert_eq!(kind(0, 1), FrameKind::Kernel);
        assert_eq!(kind(999, 1), FrameKind::Kernel);
        assert_eq!(kind(0, 0), FrameKind::Native);
    }

    #[test]
    fn the_last_sample_type_is_shown_when_none_is_stated() {
        let mut profile = Profile {
            string_table: strings(&["", "samples", "cpu"]),
            sample_type: vec![ValueType { r#type: 1, unit: 0 }, ValueType { r#type: 2, unit: 0 }],
            ..Default::default()
        };
        assert_eq!(profile.default_sample_type_index(), Some(1));
        profile.default_sample_type = 1;
        assert_eq!(profile.default_sample_type_index(), Some(0));
        assert_eq!(Profile::default().default_sample_type_index(), None);
    }
}
