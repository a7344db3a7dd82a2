//! Samples in, a profile without duplicates out.

use crate::FrameKind;
use crate::intern::Interner;
use crate::proto::{Function, Label, Line, Location, Mapping, Profile, Sample, ValueType};

/// Name and unit of a value: `cpu` in `nanoseconds`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeSpec<'a> {
    /// profile.proto: ValueType.type.
    pub name: &'a str,
    /// profile.proto: ValueType.unit.
    pub unit: &'a str,
}

impl<'a> TypeSpec<'a> {
    /// A value called `name`, counted in `unit`.
    pub const fn new(name: &'a str, unit: &'a str) -> Self {
        Self { name, unit }
    }
}

/// An address range and the file behind it. profile.proto: Mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingSpec<'a> {
    /// First address.
    pub start: u64,
    /// End of the range, exclusive. One below `start` is taken as `start`.
    pub limit: u64,
    /// Byte of the file at `start`.
    pub offset: u64,
    /// Path, or a name in brackets such as `[vdso]`.
    pub filename: &'a str,
    /// GNU build id in hexadecimal, or another identity of the content; empty when unknown.
    pub build_id: &'a str,
}

/// A code address and the source lines there. profile.proto: Location.
///
/// All fields together are the location's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocationSpec<'a> {
    /// The mapping around `address`.
    pub mapping: Option<MappingId>,
    /// The address, inside the mapping's range; 0 for frames that have none.
    pub address: u64,
    /// What kind of code it is.
    pub kind: FrameKind,
    /// Several symbols share the address.
    pub is_folded: bool,
    /// One line per inlined call, innermost first; empty when unresolved.
    pub lines: &'a [LineSpec<'a>],
}

/// A place in a function's source. profile.proto: Line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineSpec<'a> {
    /// The function.
    pub function: FunctionSpec<'a>,
    /// Line, from 1; 0 when unknown.
    pub line: i64,
    /// Column, from 1; 0 when unknown.
    pub column: i64,
}

/// A function. profile.proto: Function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionSpec<'a> {
    /// Demangled name.
    pub name: &'a str,
    /// Mangled name, or the same as `name`.
    pub system_name: &'a str,
    /// Source file; empty when unknown.
    pub filename: &'a str,
    /// First line of the function; 0 when unknown.
    pub start_line: i64,
}

/// A label of one sample. profile.proto: Label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LabelSpec<'a> {
    /// The key.
    pub key: &'a str,
    /// The value.
    pub value: LabelValue<'a>,
}

/// The value of a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabelValue<'a> {
    /// Text.
    Text(&'a str),
    /// A number with its unit; an empty unit leaves the reader to guess.
    Number(i64, &'a str),
}

impl<'a> LabelSpec<'a> {
    /// A label with text.
    pub const fn text(key: &'a str, text: &'a str) -> Self {
        Self { key, value: LabelValue::Text(text) }
    }

    /// A label with a number that has no unit, such as a process id.
    pub const fn number(key: &'a str, number: i64) -> Self {
        Self { key, value: LabelValue::Number(number, "") }
    }

    /// pprof cannot tell an empty key or an empty text from a label that is not there.
    fn is_absent(&self) -> bool {
        self.key.is_empty() || self.value == LabelValue::Text("")
    }
}

/// A mapping of one [`ProfileBuilder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MappingId(u64);

/// A location of one [`ProfileBuilder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LocationId(u64);

/// [`Location`] with its lines as an index, so that it can be a key without owning them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct LocationKey {
    mapping_id: u64,
    address: u64,
    kind: u32,
    is_folded: bool,
    lines: usize,
}

/// A stack and a label set, as indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct SampleKey {
    stack: usize,
    labels: usize,
}

/// Builds a [`Profile`] in which every string, function, mapping, location and (stack, label set) exists once.
///
/// Tables keep the order in which their entries were first seen, so the same calls give the same profile, byte
/// for byte. What [`ProfileBuilder::finish`] returns passes [`crate::check()`].
///
/// The builder is as large as the distinct content it was given: bounding that is the caller's part.
#[derive(Debug)]
pub struct ProfileBuilder {
    /// The profile's own fields; its tables stay empty until the end.
    header: Profile,
    strings: Interner<Box<str>>,
    /// Keys have id 0; the entry's position gives the id.
    functions: Interner<Function>,
    /// Keys have id 0 and no flag set.
    mappings: Interner<Mapping>,
    lines: Interner<Box<[Line]>>,
    locations: Interner<LocationKey>,
    stacks: Interner<Box<[u64]>>,
    labels: Interner<Box<[Label]>>,
    samples: Interner<SampleKey>,
    /// The values of all samples, one after the other, a sample type each.
    values: Vec<i64>,
    /// Room for the list being interned, kept to not allocate per call.
    scratch_ids: Vec<u64>,
    scratch_labels: Vec<Label>,
}

impl ProfileBuilder {
    /// A profile without samples. `period` is how much of `period_type` lies between two samples: for 19 Hz of
    /// `cpu/nanoseconds`, 1e9/19.
    pub fn new(sample_types: &[TypeSpec<'_>], period_type: TypeSpec<'_>, period: i64) -> Self {
        let mut builder = Self {
            header: Profile { period, ..Profile::default() },
            strings: Interner::default(),
            functions: Interner::default(),
            mappings: Interner::default(),
            lines: Interner::default(),
            locations: Interner::default(),
            stacks: Interner::default(),
            labels: Interner::default(),
            samples: Interner::default(),
            values: Vec::new(),
            scratch_ids: Vec::new(),
            scratch_labels: Vec::new(),
        };
        // profile.proto: string_table[0] is "".
        builder.string("");
        builder.header.sample_type = sample_types.iter().map(|&t| builder.value_type(t)).collect();
        builder.header.period_type = Some(builder.value_type(period_type));
        builder
    }

    /// Names the sample type that readers show first.
    ///
    /// # Panics
    /// When no sample type has this name.
    pub fn default_sample_type(&mut self, name: &str) {
        let name_index = self.string(name);
        let known = self.header.sample_type.iter().any(|t| t.r#type == name_index);
        assert!(known, "default sample type {name:?} is not among the sample types");
        self.header.default_sample_type = name_index;
    }

    /// Adds a line of free text, once.
    pub fn comment(&mut self, text: &str) {
        let text = self.string(text);
        if !self.header.comment.contains(&text) {
            self.header.comment.push(text);
        }
    }

    /// Start of the collection, in nanoseconds since the Unix epoch.
    pub fn time_ns(&mut self, time_ns: i64) {
        self.header.time_nanos = time_ns;
    }

    /// Length of the collection.
    pub fn duration_ns(&mut self, duration_ns: i64) {
        self.header.duration_nanos = duration_ns;
    }

    /// An absolute URL that explains the profile.
    pub fn doc_url(&mut self, url: &str) {
        self.header.doc_url = self.string(url);
    }

    /// How much of the period type lies between two samples.
    pub(crate) fn period(&mut self, period: i64) {
        self.header.period = period;
    }

    /// profile.proto: Profile.drop_frames, Profile.keep_frames.
    pub fn frame_filters(&mut self, drop_frames: &str, keep_frames: &str) {
        self.header.drop_frames = self.string(drop_frames);
        self.header.keep_frames = self.string(keep_frames);
    }

    /// The mapping with this content. The first one asked for is what readers call the main binary.
    pub fn mapping(&mut self, spec: &MappingSpec<'_>) -> MappingId {
        let &MappingSpec { start, limit, offset, filename, build_id } = spec;
        let mapping = Mapping {
            memory_start: start,
            memory_limit: limit.max(start),
            file_offset: offset,
            filename: self.string(filename),
            build_id: self.string(build_id),
            ..Mapping::default()
        };
        MappingId(to_id(self.mappings.intern(&mapping)))
    }

    /// Makes this mapping the main binary, unless there is one.
    pub(crate) fn main_mapping(&mut self, spec: &MappingSpec<'_>) {
        if self.mappings.len() == 0 {
            self.mapping(spec);
        }
    }

    /// The location with this content.
    ///
    /// # Panics
    /// When the mapping is not of this builder.
    pub fn location(&mut self, spec: &LocationSpec<'_>) -> LocationId {
        let &LocationSpec { mapping, address, kind, is_folded, lines } = spec;
        let mapping_id = mapping.map_or(0, |MappingId(id)| id);
        assert!(
            mapping_id <= to_wire_len(self.mappings.len()),
            "mapping {mapping_id} is not of this builder"
        );
        let lines: Vec<Line> = lines.iter().map(|line| self.line(line)).collect();
        let lines = self.lines.intern(&lines[..]);
        let key = LocationKey { mapping_id, address, kind: kind.to_wire(), is_folded, lines };
        LocationId(to_id(self.locations.intern(&key)))
    }

    /// Adds `values` to the sample with this stack (leaf first) and these labels, in whatever order the labels
    /// come. A label with an empty key or an empty text is as good as absent, and dropped. Sums saturate at
    /// the bounds of `i64`.
    ///
    /// # Panics
    /// When `values` are not one per sample type, or a location is not of this builder.
    pub fn sample(&mut self, stack: &[LocationId], values: &[i64], labels: &[LabelSpec<'_>]) {
        let types = self.header.sample_type.len();
        assert!(types > 0, "a sample needs a sample type");
        assert!(values.len() == types, "{} values for {types} sample types", values.len());
        let key = SampleKey { stack: self.stack(stack), labels: self.label_set(labels) };
        let first = self.samples.intern(&key) * types;
        if first == self.values.len() {
            self.values.extend_from_slice(values);
            return;
        }
        for (sum, value) in self.values[first..].iter_mut().zip(values) {
            *sum = sum.saturating_add(*value);
        }
    }

    /// How many distinct samples there are by now.
    pub fn sample_count(&self) -> usize {
        self.samples.len()
    }

    /// The profile. Ids are 1, 2, 3, ... in the order of first mention; every mapping says `has_functions`, so
    /// that `go tool pprof` never searches the user's machine for binaries of that name.
    pub fn finish(self) -> Profile {
        let Self {
            mut header, strings, functions, mappings, lines, locations, stacks, labels, samples, ..
        } = self;
        header.sample = to_samples(samples, &stacks.into_ordered(), &labels.into_ordered(), &self.values);
        header.location = to_locations(locations, &lines.into_ordered());
        header.function = number(functions, |function, id| function.id = id);
        header.mapping = number(mappings, |mapping, id| mapping.id = id);
        header.string_table = strings.into_ordered().into_iter().map(String::from).collect();
        set_resolution(&mut header);
        header
    }

    fn string(&mut self, string: &str) -> i64 {
        to_index(self.strings.intern(string))
    }

    fn value_type(&mut self, spec: TypeSpec<'_>) -> ValueType {
        ValueType { r#type: self.string(spec.name), unit: self.string(spec.unit) }
    }

    fn line(&mut self, spec: &LineSpec<'_>) -> Line {
        let &LineSpec { function: FunctionSpec { name, system_name, filename, start_line }, line, column } =
            spec;
        let function = Function {
            id: 0,
            name: self.string(name),
            system_name: self.string(system_name),
            filename: self.string(filename),
            start_line,
        };
        Line { function_id: to_id(self.functions.intern(&function)), line, column }
    }

    fn stack(&mut self, stack: &[LocationId]) -> usize {
        let locations = to_wire_len(self.locations.len());
        self.scratch_ids.clear();
        self.scratch_ids.extend(stack.iter().map(|&LocationId(id)| id));
        let foreign = self.scratch_ids.iter().find(|&&id| id > locations);
        assert!(foreign.is_none(), "location {foreign:?} is not of this builder");
        self.stacks.intern(&self.scratch_ids[..])
    }

    fn label_set(&mut self, labels: &[LabelSpec<'_>]) -> usize {
        let mut scratch = std::mem::take(&mut self.scratch_labels);
        scratch.clear();
        scratch.extend(labels.iter().filter(|label| !label.is_absent()).map(|label| self.label(label)));
        // Any order makes label sets comparable; that of the string table is the same for the same calls.
        scratch.sort_unstable_by_key(|&Label { key, str, num, num_unit }| (key, str, num, num_unit));
        let index = self.labels.intern(&scratch[..]);
        self.scratch_labels = scratch;
        index
    }

    fn label(&mut self, spec: &LabelSpec<'_>) -> Label {
        let key = self.string(spec.key);
        match spec.value {
            LabelValue::Text(text) => Label { key, str: self.string(text), num: 0, num_unit: 0 },
            LabelValue::Number(num, unit) => Label { key, str: 0, num, num_unit: self.string(unit) },
        }
    }
}

/// The id of the entry at `index`.
fn to_id(index: usize) -> u64 {
    to_wire_len(index) + 1
}

fn to_wire_len(len: usize) -> u64 {
    u64::try_from(len).expect("a table in memory has fewer than 2^64 entries")
}

fn to_index(index: usize) -> i64 {
    i64::try_from(index).expect("a table in memory has fewer than 2^63 entries")
}

fn number<T: std::hash::Hash + Eq>(table: Interner<T>, set_id: impl Fn(&mut T, u64)) -> Vec<T> {
    let mut entries = table.into_ordered();
    entries.iter_mut().zip(1..).for_each(|(entry, id)| set_id(entry, id));
    entries
}

fn to_locations(locations: Interner<LocationKey>, lines: &[Box<[Line]>]) -> Vec<Location> {
    let to_location = |(LocationKey { mapping_id, address, kind, is_folded, lines: at }, id)| {
        let line = lines[at].to_vec();
        Location { id, mapping_id, address, line, is_folded, kind }
    };
    locations.into_ordered().into_iter().zip(1..).map(to_location).collect()
}

fn to_samples(
    samples: Interner<SampleKey>,
    stacks: &[Box<[u64]>],
    labels: &[Box<[Label]>],
    values: &[i64],
) -> Vec<Sample> {
    let samples = samples.into_ordered();
    // `max(1)` serves the profile without sample types, which has no samples and no values either.
    let types = (values.len() / samples.len().max(1)).max(1);
    let to_sample = |(key, values): (&SampleKey, &[i64])| Sample {
        location_id: stacks[key.stack].to_vec(),
        value: values.to_vec(),
        label: labels[key.labels].to_vec(),
    };
    samples.iter().zip(values.chunks_exact(types)).map(to_sample).collect()
}

/// Says in each mapping what its locations' lines hold.
fn set_resolution(profile: &mut Profile) {
    let Profile { mapping: mappings, location: locations, function: functions, .. } = profile;
    for mapping in mappings.iter_mut() {
        mapping.has_functions = true;
    }
    for location in locations.iter() {
        let Some(mapping) = entry_mut(mappings, location.mapping_id) else { continue };
        mapping.has_inline_frames |= location.line.len() > 1;
        for line in &location.line {
            mapping.has_line_numbers |= line.line != 0;
            mapping.has_filenames |= entry_mut(functions, line.function_id).is_some_and(|f| f.filename != 0);
        }
    }
}

fn entry_mut<T>(table: &mut [T], id: u64) -> Option<&mut T> {
    table.get_mut(usize::try_from(id.checked_sub(1)?).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;
    use crate::fixture::{CPU, SAMPLES, function, plain, profile};

    fn builder() -> ProfileBuilder {
        ProfileBuilder::new(&[SAMPLES, CPU], CPU, 10)
    }

    #[test]
    fn equal_content_is_stored_once() {
        let mut builder = builder();
        let main = plain(&mut builder, "main");
        assert_eq!(plain(&mut builder, "main"), main);
        builder.sample(&[main], &[1, 10], &[]);
        builder.sample(&[main], &[2, 20], &[]);
        builder.comment("once");
        builder.comment("once");
        let profile = builder.finish();
        assert_eq!(
            profile.string_table,
            ["", "samples", "count", "cpu", "nanoseconds", "main", "app.c", "once"]
        );
        assert_eq!((profile.function.len(), profile.location.len(), profile.comment.len()), (1, 1, 1));
        assert_eq!(profile.sample.len(), 1);
        assert_eq!(profile.sample[0].value, [3, 30]);
    }

    #[test]
    fn the_order_of_labels_does_not_make_a_sample() {
        let (comm, pid) = (LabelSpec::text("comm", "app"), LabelSpec::number("pid", 1));
        let mut builder = builder();
        builder.sample(&[], &[1, 10], &[comm, pid]);
        builder.sample(&[], &[1, 10], &[pid, comm]);
        builder.sample(&[], &[1, 10], &[comm]);
        builder.sample(&[], &[1, 10], &[comm, LabelSpec::number("pid", 2)]);
        assert_eq!(builder.sample_count(), 3);
    }

    #[test]
    fn labels_without_key_or_text_are_dropped_but_zero_is_a_number() {
        let mut builder = builder();
        let absent = [LabelSpec::text("comm", ""), LabelSpec::text("", "x"), LabelSpec::number("", 1)];
        builder.sample(&[], &[1, 10], &absent);
        builder.sample(&[], &[1, 10], &[LabelSpec::number("cpu", 0)]);
        let profile = builder.finish();
        assert_eq!(profile.sample[0].label, []);
        assert_eq!(profile.sample[1].label.len(), 1);
        assert_eq!(check(&profile), Ok(()));
    }

    #[test]
    fn each_part_of_a_location_makes_another_one() {
        let mut builder = builder();
        let range = |start| MappingSpec { start, limit: 9, offset: 0, filename: "a", build_id: "" };
        let (one, two) = (builder.mapping(&range(1)), builder.mapping(&range(2)));
        assert_ne!(one, two);
        let lines = [LineSpec { function: function("f", ""), line: 1, column: 0 }];
        let base = LocationSpec {
            mapping: Some(one),
            address: 1,
            kind: FrameKind::Native,
            is_folded: false,
            lines: &lines,
        };
        let moved = [LineSpec { line: 2, ..lines[0] }];
        let variants = [
            base,
            LocationSpec { mapping: Some(two), ..base },
            LocationSpec { mapping: None, ..base },
            LocationSpec { address: 2, ..base },
            LocationSpec { kind: FrameKind::Jit, ..base },
            LocationSpec { is_folded: true, ..base },
            LocationSpec { lines: &moved, ..base },
            LocationSpec { lines: &[], ..base },
        ];
        let ids: std::collections::HashSet<LocationId> =
            variants.iter().map(|v| builder.location(v)).collect();
        assert_eq!(ids.len(), variants.len());
        assert_eq!(builder.locations.len(), variants.len());
    }

    #[test]
    fn sums_saturate_at_both_ends() {
        let mut builder = builder();
        builder.sample(&[], &[i64::MAX, i64::MIN], &[]);
        builder.sample(&[], &[1, -1], &[]);
        assert_eq!(builder.finish().sample[0].value, [i64::MAX, i64::MIN]);
    }

    #[test]
    fn mappings_say_what_their_lines_hold() {
        let resolved =
            |m: &Mapping| (m.has_functions, m.has_filenames, m.has_line_numbers, m.has_inline_frames);
        let profile = profile();
        let [app, kernel] = &profile.mapping[..] else { panic!("two mappings") };
        assert_eq!(resolved(app), (true, true, true, true));
        assert_eq!(resolved(kernel), (true, false, false, false));
    }

    #[test]
    fn a_mapping_that_ends_before_its_start_is_empty() {
        let mut builder = builder();
        builder.mapping(&MappingSpec { start: 9, limit: 3, offset: 0, filename: "", build_id: "" });
        let profile = builder.finish();
        assert_eq!(profile.mapping[0].memory_limit, 9);
        assert_eq!(check(&profile), Ok(()));
    }

    #[test]
    fn a_profile_without_samples_or_types_is_valid() {
        assert_eq!(check(&builder().finish()), Ok(()));
        assert_eq!(check(&ProfileBuilder::new(&[], CPU, 1).finish()), Ok(()));
    }

    #[test]
    fn the_same_calls_give_the_same_bytes() {
        assert_eq!(crate::encode_gzip(&profile()), crate::encode_gzip(&profile()));
    }

    #[test]
    #[should_panic(expected = "1 values for 2 sample types")]
    fn a_missing_value_is_a_mistake_of_the_caller() {
        builder().sample(&[], &[1], &[]);
    }

    #[test]
    #[should_panic(expected = "is not of this builder")]
    fn a_location_of_another_builder_is_a_mistake_of_the_caller() {
        let foreign = plain(&mut builder(), "main");
        builder().sample(&[foreign], &[1, 10], &[]);
    }

    #[test]
    #[should_panic(expected = "is not among the sample types")]
    fn an_unknown_default_sample_type_is_a_mistake_of_the_caller() {
        builder().default_sample_type("wall");
    }
}
