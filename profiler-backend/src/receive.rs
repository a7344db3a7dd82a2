//! Pushes: from the body of a request to profiles in the store.

use std::{
    collections::{BTreeSet, HashMap},
    io::{self, Read},
    sync::Arc,
};

use profiler_pprof::{
    CheckError, DecodeError, DecodeLimits, check, decode,
    proto::{self, Location},
    push::{self, PushError, PushRequest, Temporality},
};

use crate::{
    model::{
        BatchId, ContentId, Labels, NumberLabel, Profile, ProfileHead, Sample, SampleLabels, Series, Strings,
        ValueType,
    },
    stack::{Frame, FrameParts, Stack, StackCache},
};

/// Most calls of one stack, inlined ones counted.
const STACK_FRAMES_MAX: usize = 4096;
/// Longest name of a function or file, in bytes; C++ and Rust make them long. The rest is cut off, visibly.
const NAME_BYTES_MAX: usize = 16 << 10;
/// Most sample types of a profile.
const SAMPLE_TYPES_MAX: usize = 16;

/// How a body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    Identity,
    Gzip,
    Zstd,
}

impl Compression {
    const ALL: [Self; 3] = [Self::Identity, Self::Gzip, Self::Zstd];

    /// From the value of `Content-Encoding`; `None` for one this backend does not read.
    pub(crate) fn from_header(value: &str) -> Option<Self> {
        let value = value.trim();
        if value.is_empty() {
            return Some(Self::Identity);
        }
        Self::ALL.into_iter().find(|compression| compression.name().eq_ignore_ascii_case(value))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    /// The number in a record of the log.
    fn to_record(self) -> u8 {
        match self {
            Self::Identity => 0,
            Self::Gzip => 1,
            Self::Zstd => 2,
        }
    }
}

/// Why a push is refused for good.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error("the body is larger than {max} bytes after inflating")]
    TooLarge { max: usize },
    #[error("the body is no {encoding} stream: {source}")]
    Inflate { encoding: &'static str, source: io::Error },
    #[error(transparent)]
    Push(#[from] PushError),
    #[error("series {index} {labels}: {source}")]
    Series { index: usize, labels: String, source: ProfileError },
    #[error("an empty record")]
    EmptyRecord,
    #[error("unknown compression {found} in a record")]
    UnknownCompression { found: u8 },
}

/// Why the profile of a series is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProfileError {
    #[error("the profiles of this push take more than {max} bytes")]
    TooLarge { max: usize },
    #[error("pprof: {}", crate::describe(.0))]
    Decode(DecodeError),
    #[error("pprof: {0}")]
    Check(#[from] CheckError),
    #[error("pprof: no sample type")]
    NoSampleType,
    #[error("pprof: {found} sample types, more than {SAMPLE_TYPES_MAX}")]
    ManySampleTypes { found: usize },
    #[error(
        "pprof: type {name:?} in unit {unit:?}: '/' in the name, ',' in either or a line break cannot be stored"
    )]
    TypeName { name: String, unit: String },
    #[error("pprof: sample {sample}: a stack of more than {STACK_FRAMES_MAX} calls")]
    DeepStack { sample: usize },
    #[error("pprof: sample {sample}: label {name:?} occurs twice")]
    LabelTwice { sample: usize, name: String },
    #[error("pprof: sample {sample}: label name {name:?} is empty or has a line break")]
    LabelName { sample: usize, name: String },
}

/// What arrives: a body as it was sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Body<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) compression: Compression,
    /// Most bytes after inflating, of the body and of all its profiles together.
    pub(crate) inflated_bytes_max: usize,
}

impl Body<'_> {
    /// The body as a record of the log: compression, then the bytes as they came.
    pub(crate) fn to_record(self) -> Vec<u8> {
        let mut record = Vec::with_capacity(1 + self.bytes.len());
        record.push(self.compression.to_record());
        record.extend_from_slice(self.bytes);
        record
    }

    /// The reverse of [`Body::to_record`].
    pub(crate) fn from_record(record: &[u8], inflated_bytes_max: usize) -> Result<Body<'_>, ReceiveError> {
        let (&number, bytes) = record.split_first().ok_or(ReceiveError::EmptyRecord)?;
        let compression = Compression::ALL.into_iter().find(|compression| compression.to_record() == number);
        let compression = compression.ok_or(ReceiveError::UnknownCompression { found: number })?;
        Ok(Body { bytes, compression, inflated_bytes_max })
    }

    /// Reads and validates the request in this body; its profiles are not looked into.
    pub(crate) fn request(&self) -> Result<PushRequest, ReceiveError> {
        let max = self.inflated_bytes_max;
        match self.compression {
            Compression::Identity if self.bytes.len() > max => Err(ReceiveError::TooLarge { max }),
            Compression::Identity => Ok(PushRequest::from_bytes(self.bytes)?),
            Compression::Gzip => self.inflate(flate2::bufread::MultiGzDecoder::new(self.bytes)),
            Compression::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(self.bytes);
                self.inflate(decoder.map_err(|source| self.inflate_error(source))?)
            }
        }
    }

    fn inflate(&self, decoder: impl Read) -> Result<PushRequest, ReceiveError> {
        let max = self.inflated_bytes_max;
        let mut inflated = Vec::new();
        let read = decoder.take(max as u64 + 1).read_to_end(&mut inflated);
        read.map_err(|source| self.inflate_error(source))?;
        match inflated.len() > max {
            true => Err(ReceiveError::TooLarge { max }),
            false => Ok(PushRequest::from_bytes(&inflated)?),
        }
    }

    fn inflate_error(&self, source: io::Error) -> ReceiveError {
        ReceiveError::Inflate { encoding: self.compression.name(), source }
    }
}

/// The id of a validated request.
pub(crate) fn batch_id(request: &PushRequest) -> BatchId {
    ContentId::from_slice(&request.batch_id).expect("validation checks its length")
}

/// The profiles of a request: all of them, or the error of the first that is wrong.
pub(crate) fn profiles(
    request: &PushRequest,
    stacks: &StackCache,
    inflated_bytes_max: usize,
) -> Result<Vec<Profile>, ReceiveError> {
    let batch = batch_id(request);
    // Shared by all series of the request: each alone could inflate to the bound.
    let mut budget = inflated_bytes_max;
    let mut profiles = Vec::with_capacity(request.series.len());
    for (index, series) in request.series.iter().enumerate() {
        let profile = profile(series, batch, stacks, &mut budget).map_err(|source| ReceiveError::Series {
            index,
            labels: label_text(&series.labels),
            source,
        })?;
        profiles.push(profile);
    }
    Ok(profiles)
}

/// `{container="cart"}`, cut to what fits on a line.
fn label_text(labels: &[push::Label]) -> String {
    let pairs: Vec<String> = labels.iter().map(|l| format!("{}={:?}", l.name, l.value)).collect();
    let mut text = format!("{{{}}}", pairs.join(","));
    if text.len() > 200 {
        text.truncate(text.floor_char_boundary(200));
        text.push('…');
    }
    text
}

fn profile(
    series: &push::Series,
    batch: BatchId,
    stacks: &StackCache,
    budget: &mut usize,
) -> Result<Profile, ProfileError> {
    let limits = DecodeLimits { inflated_bytes_max: *budget, ..DecodeLimits::default() };
    let profile = decode(&series.pprof, &limits).map_err(|error| match error {
        DecodeError::TooLarge { max } => ProfileError::TooLarge { max },
        other => ProfileError::Decode(other),
    })?;
    *budget = budget.saturating_sub(prost::Message::encoded_len(&profile));
    check(&profile)?;
    let mut strings = Strings::default();
    let samples = samples(&profile, stacks, &mut strings)?;
    let head = profile_head(series, &profile, &samples, batch, &mut strings)?;
    Ok(Profile::new(head, samples))
}

fn profile_head(
    series: &push::Series,
    profile: &proto::Profile,
    samples: &[Sample],
    batch: BatchId,
    strings: &mut Strings,
) -> Result<ProfileHead, ProfileError> {
    let labels = series.labels.iter().map(|l| (strings.get(&l.name), strings.get(&l.value))).collect();
    let temporality = Temporality::from_wire(series.temporality).expect("validation checks it");
    let sample_types = sample_types(profile, strings)?;
    let period_type = profile.period_type.unwrap_or_default();
    let label_names: BTreeSet<Arc<str>> = samples.iter().flat_map(|s| s.labels.names().cloned()).collect();
    let comments = profile.comment.iter().filter_map(|&index| profile.string(index));
    Ok(ProfileHead {
        batch,
        start_us: series.start_unix_ns.div_euclid(1000),
        duration_ns: i64::try_from(series.duration_ns).expect("validation bounds it to a day"),
        default_sample_type: profile.default_sample_type_index().ok_or(ProfileError::NoSampleType)?,
        sample_types,
        period_type: value_type(profile, &period_type, strings)?,
        period: profile.period,
        // Stored as lines of one text.
        comments: comments.flat_map(str::lines).map(|line| strings.get(line)).collect(),
        label_names: label_names.into_iter().collect(),
        series: Arc::new(Series::new(strings.get(&series.profile_type), temporality, Labels::new(labels))),
    })
}

fn sample_types(profile: &proto::Profile, strings: &mut Strings) -> Result<Arc<[ValueType]>, ProfileError> {
    match profile.sample_type.len() {
        0 => Err(ProfileError::NoSampleType),
        found if found > SAMPLE_TYPES_MAX => Err(ProfileError::ManySampleTypes { found }),
        _ => profile.sample_type.iter().map(|t| value_type(profile, t, strings)).collect(),
    }
}

fn value_type(
    profile: &proto::Profile,
    value_type: &proto::ValueType,
    strings: &mut Strings,
) -> Result<ValueType, ProfileError> {
    let text = |index| profile.string(index).unwrap_or("");
    let (name, unit) = (text(value_type.r#type), text(value_type.unit));
    let separators = |text: &str| text.contains([',', '\n', '\r']);
    if name.contains('/') || separators(name) || separators(unit) {
        return Err(ProfileError::TypeName { name: name.to_owned(), unit: unit.to_owned() });
    }
    Ok(ValueType { name: strings.get(name), unit: strings.get(unit) })
}

fn samples(
    profile: &proto::Profile,
    cache: &StackCache,
    strings: &mut Strings,
) -> Result<Vec<Sample>, ProfileError> {
    let locations: Vec<Vec<Arc<Frame>>> =
        profile.location.iter().map(|location| frames(profile, location, cache, strings)).collect();
    let mut stacks: HashMap<&[u64], Arc<Stack>> = HashMap::new();
    let mut samples = Vec::with_capacity(profile.sample.len());
    for (index, sample) in profile.sample.iter().enumerate() {
        let stack = match stacks.get(&*sample.location_id) {
            Some(known) => Arc::clone(known),
            None => {
                let stack = stack(sample, &locations, cache);
                let stack = stack.ok_or(ProfileError::DeepStack { sample: index })?;
                stacks.insert(&sample.location_id, Arc::clone(&stack));
                stack
            }
        };
        let labels = Arc::new(sample_labels(profile, index, sample, strings)?);
        samples.push(Sample { stack, labels, values: sample.value.clone().into_boxed_slice() });
    }
    Ok(samples)
}

/// `None` when it is too deep.
fn stack(sample: &proto::Sample, locations: &[Vec<Arc<Frame>>], cache: &StackCache) -> Option<Arc<Stack>> {
    let mut frames = Vec::new();
    for &id in &sample.location_id {
        // The check made sure that ids are positions from 1.
        let location = usize::try_from(id).ok().and_then(|id| locations.get(id.checked_sub(1)?));
        frames.extend(location.into_iter().flatten().cloned());
        if frames.len() > STACK_FRAMES_MAX {
            return None;
        }
    }
    Some(cache.stack(frames))
}

/// The calls at a location, innermost first. One without a symbol is still a call.
fn frames(
    profile: &proto::Profile,
    location: &Location,
    cache: &StackCache,
    strings: &mut Strings,
) -> Vec<Arc<Frame>> {
    let mapping = profile.mapping(location.mapping_id);
    let mut text = |index: i64| strings.get(&cut(profile.string(index).unwrap_or("")));
    let empty = text(0);
    let (binary, build_id) = mapping.map_or((0, 0), |mapping| (mapping.filename, mapping.build_id));
    let (binary, build_id) = (text(binary), text(build_id));
    let outermost = FrameParts {
        kind: profile.kind(location),
        inlined: false,
        function: Arc::clone(&empty),
        system_name: Arc::clone(&empty),
        file: empty,
        start_line: 0,
        line: 0,
        column: 0,
        address: mapping.map_or(location.address, |mapping| file_offset(mapping, location.address)),
        binary,
        build_id,
    };
    let Some(last) = location.line.len().checked_sub(1) else { return vec![cache.frame(outermost)] };
    let lines = location.line.iter().enumerate();
    let frames = lines.map(|(index, line)| {
        let function = profile.function(line.function_id).copied().unwrap_or_default();
        cache.frame(FrameParts {
            inlined: index < last,
            function: text(function.name),
            system_name: text(function.system_name),
            file: text(function.filename),
            start_line: function.start_line,
            line: line.line,
            column: line.column,
            ..outermost.clone()
        })
    });
    frames.collect()
}

/// Where the byte at `address` lies in the mapped file; the address itself when the mapping says no range.
fn file_offset(mapping: &proto::Mapping, address: u64) -> u64 {
    let range = mapping.memory_start..mapping.memory_limit;
    match range.contains(&address) {
        true => (address - range.start).wrapping_add(mapping.file_offset),
        false => address,
    }
}

fn cut(name: &str) -> std::borrow::Cow<'_, str> {
    match name.split_at_checked(name.floor_char_boundary(NAME_BYTES_MAX)) {
        Some((kept, rest)) if !rest.is_empty() => format!("{kept}…").into(),
        _ => name.into(),
    }
}

fn sample_labels(
    profile: &proto::Profile,
    index: usize,
    sample: &proto::Sample,
    strings: &mut Strings,
) -> Result<SampleLabels, ProfileError> {
    let mut texts = Vec::new();
    let mut numbers = Vec::new();
    for label in &sample.label {
        let name = strings.get(profile.string(label.key).unwrap_or(""));
        if name.is_empty() || name.contains(['\n', '\r']) {
            return Err(ProfileError::LabelName { sample: index, name: name.to_string() });
        }
        match label.str {
            0 => {
                let unit = strings.get(profile.string(label.num_unit).unwrap_or(""));
                numbers.push(NumberLabel { name, value: label.num, unit });
            }
            text => texts.push((name, strings.get(&cut(profile.string(text).unwrap_or(""))))),
        }
    }
    numbers.sort();
    let names = texts.iter().map(|(name, _)| name).chain(numbers.iter().map(|label| &label.name));
    if let Some(name) = repeated(names) {
        return Err(ProfileError::LabelTwice { sample: index, name: name.to_string() });
    }
    Ok(SampleLabels { texts: Labels::new(texts), numbers: numbers.into_boxed_slice() })
}

fn repeated<'a>(names: impl Iterator<Item = &'a Arc<str>>) -> Option<&'a Arc<str>> {
    let mut names: Vec<&Arc<str>> = names.collect();
    names.sort();
    names.windows(2).find_map(|pair| match pair {
        [a, b] if a == b => Some(*a),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use profiler_pprof::{
        FunctionSpec, LabelSpec, LineSpec, LocationSpec, MappingSpec, ProfileBuilder, TypeSpec,
    };
    use proptest::prelude::*;

    use super::*;

    const BYTES_MAX: usize = 1 << 20;

    fn push() -> PushRequest {
        let cpu = TypeSpec::new("cpu", "nanoseconds");
        let mut builder = ProfileBuilder::new(&[cpu], cpu, 10);
        let mapping = builder.mapping(&MappingSpec {
            start: 0x40_0000,
            limit: 0x50_0000,
            offset: 0x2000,
            filename: "/bin/app",
            build_id: "c0ffee",
        });
        let function =
            FunctionSpec { name: "work", system_name: "_Z4workv", filename: "a.cc", start_line: 3 };
        let location = builder.location(&LocationSpec {
            mapping: Some(mapping),
            address: 0x40_1000,
            kind: profiler_pprof::FrameKind::Native,
            is_folded: false,
            lines: &[LineSpec { function, line: 5, column: 0 }],
        });
        builder.sample(&[location], &[7], &[LabelSpec::text("comm", "app"), LabelSpec::number("pid", 9)]);
        let series = push::Series {
            labels: push::labels([("container", "cart")]),
            profile_type: "cpu".to_owned(),
            temporality: Temporality::Delta.to_wire(),
            start_unix_ns: 1_795_255_200_000_000_000,
            duration_ns: 10_000_000_000,
            pprof: profiler_pprof::encode(&builder.finish()),
        };
        PushRequest {
            format_version: push::FORMAT_VERSION,
            batch_id: vec![1; push::BATCH_ID_BYTES],
            agent: "test/1".to_owned(),
            series: vec![series],
        }
    }

    fn read(bytes: &[u8]) -> Result<Vec<Profile>, ReceiveError> {
        let body = Body { bytes, compression: Compression::Identity, inflated_bytes_max: BYTES_MAX };
        profiles(&body.request()?, &StackCache::new(1 << 20), BYTES_MAX)
    }

    #[test]
    fn an_address_becomes_a_byte_of_its_file() {
        let profiles = read(&push().to_bytes()).expect("a valid push");
        let [Profile { samples, .. }] = &*profiles else { panic!("one profile: {profiles:?}") };
        let [Sample { stack, labels, values }] = &**samples else { panic!("one sample: {samples:?}") };
        assert_eq!(stack.frames.iter().map(|frame| frame.parts.address).collect::<Vec<_>>(), [0x3000]);
        assert_eq!((labels.get("comm").as_deref(), labels.get("pid").as_deref()), (Some("app"), Some("9")));
        assert_eq!(**values, [7]);
    }

    #[test]
    fn an_address_outside_of_its_mapping_stays() {
        let mapping = proto::Mapping {
            memory_start: 0x1000,
            memory_limit: 0x2000,
            file_offset: 0x10,
            ..Default::default()
        };
        assert_eq!(file_offset(&mapping, 0x1000), 0x10);
        assert_eq!(file_offset(&mapping, 0x2000), 0x2000);
        assert_eq!(file_offset(&proto::Mapping::default(), 0x77), 0x77);
    }

    #[test]
    fn long_names_are_cut_at_a_character() {
        assert_eq!(cut("short"), "short");
        let long = "é".repeat(NAME_BYTES_MAX);
        let cut = cut(&long);
        assert!(cut.ends_with('…') && cut.len() <= NAME_BYTES_MAX + '…'.len_utf8(), "{} bytes", cut.len());
    }

    #[test]
    fn a_record_gives_the_body_back() {
        let body = Body { bytes: b"x", compression: Compression::Zstd, inflated_bytes_max: 5 };
        let record = body.to_record();
        let again = Body::from_record(&record, 5).expect("a record");
        assert_eq!((again.bytes, again.compression), (body.bytes, body.compression));
        assert!(Body::from_record(&[], 5).is_err());
        assert!(Body::from_record(&[9], 5).is_err());
    }

    #[test]
    fn profiles_that_inflate_beyond_the_bound_are_refused() {
        let request = push();
        let error = profiles(&request, &StackCache::new(1 << 20), 50).expect_err("too large");
        let expect = r#"series 0 {container="cart"}: the profiles of this push take more than 50 bytes"#;
        assert_eq!(error.to_string(), expect);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_receiver_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            let _ = read(&bytes);
        }

        #[test]
        fn no_damage_to_a_push_makes_the_receiver_panic(at in any::<prop::sample::Index>(), byte: u8) {
            let mut bytes = push().to_bytes();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = read(&bytes);
        }
    }
}
