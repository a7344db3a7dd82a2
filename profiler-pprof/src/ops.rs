//! Sums, differences and multiples of profiles.
//!
//! All arithmetic saturates at the bounds of `i64`. The largest sum an agent can make, 10^9 ns a second on a
//! thousand CPUs, reaches them after 106 days; a profile from elsewhere that holds extreme numbers must not keep
//! all the others from being read.

use crate::builder::{
    FunctionSpec, LabelSpec, LabelValue, LineSpec, LocationId, LocationSpec, MappingId, MappingSpec,
    ProfileBuilder, TypeSpec,
};
use crate::proto::{Label, Line, Location, Mapping, Profile, Sample, ValueType};
use crate::{CheckError, FrameKind, check};

/// Why profiles cannot be combined.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OpsError {
    /// Nothing to merge.
    #[error("there are no profiles to merge")]
    NoProfiles,
    /// A profile is broken.
    #[error("profile {index} is not valid")]
    Invalid {
        /// Position of the profile, from 0, in the order it was given.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: CheckError,
    },
    /// Sample types differ in name, unit or order.
    #[error("profile {index} has sample types {found}, the first has {first}")]
    SampleTypes {
        /// Position of the profile, from 0.
        index: usize,
        /// Its sample types, as `name/unit name/unit`.
        found: String,
        /// Those of the first profile.
        first: String,
    },
    /// Period types differ.
    #[error("profile {index} has period type {found}, the first has {first}")]
    PeriodType {
        /// Position of the profile, from 0.
        index: usize,
        /// Its period type, as `name/unit`.
        found: String,
        /// That of the first profile.
        first: String,
    },
    /// One ratio per sample type is needed.
    #[error("{ratios} ratios for {types} sample types")]
    Ratios {
        /// Ratios given.
        ratios: usize,
        /// Sample types of the profile.
        types: usize,
    },
    /// A ratio is infinite or not a number.
    #[error("ratio {index} is {ratio}, not a finite number")]
    Ratio {
        /// Position of the ratio.
        index: usize,
        /// The ratio.
        ratio: f64,
    },
}

/// The sum of profiles with equal sample types and period type.
///
/// Values of equal (stack, labels) are added; samples whose values are all zero are dropped, and so is all that
/// only they referred to. Period = the largest, time = the earliest that is set, duration = the sum, comments =
/// the union in order of appearance; the default sample type and documentation are the first ones set; frame
/// filters are the first profile's. Up to the order of its tables, the result does not depend on how merges are
/// nested, unless a sum saturates.
///
/// # Errors
/// For no profiles, for one that [`check()`] refuses, and for types that differ.
pub fn merge(profiles: &[&Profile]) -> Result<Profile, OpsError> {
    let mut merger = Merger::default();
    for profile in profiles {
        merger.add(profile, &[])?;
    }
    merger.finish()
}

/// `profile` minus `base`: rows that only the base has are negative, rows that are equal are gone.
///
/// Time, duration, period and comments are those of `profile`.
///
/// # Errors
/// As [`merge`]; the base is profile 1.
pub fn diff(profile: &Profile, base: &Profile) -> Result<Profile, OpsError> {
    let mut negated = base.clone();
    let values = negated.sample.iter_mut().flat_map(|sample| &mut sample.value);
    values.for_each(|value| *value = value.saturating_neg());
    negated.time_nanos = 0;
    negated.duration_nanos = 0;
    negated.period = 0;
    negated.comment.clear();
    merge(&[profile, &negated])
}

/// Multiplies the values by one ratio per sample type, rounding to the nearest integer, halves away from zero.
///
/// A ratio of 1 keeps its values exactly; others go through `f64` and keep 53 bits. Samples whose values all
/// become zero are dropped; the tables stay as they are.
///
/// # Errors
/// When there is not one finite ratio per sample type.
pub fn scale(profile: &mut Profile, ratios: &[f64]) -> Result<(), OpsError> {
    let types = profile.sample_type.len();
    if ratios.len() != types {
        return Err(OpsError::Ratios { ratios: ratios.len(), types });
    }
    if let Some(index) = ratios.iter().position(|ratio| !ratio.is_finite()) {
        return Err(OpsError::Ratio { index, ratio: ratios[index] });
    }
    for sample in &mut profile.sample {
        for (value, &ratio) in sample.value.iter_mut().zip(ratios) {
            *value = scale_value(*value, ratio);
        }
    }
    profile.sample.retain(|sample| !is_zero(sample));
    Ok(())
}

fn scale_value(value: i64, ratio: f64) -> i64 {
    if ratio == 1.0 {
        return value;
    }
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "documented; `as` saturates"
    )]
    let scaled = (value as f64 * ratio).round() as i64;
    scaled
}

fn is_zero(sample: &Sample) -> bool {
    sample.value.iter().all(|&value| value == 0)
}

/// [`merge`], one profile at a time: none of them needs to stay in memory.
#[derive(Debug, Default)]
pub struct Merger {
    /// `None` before the first profile.
    sum: Option<Sum>,
    /// Profiles added.
    profiles: usize,
}

#[derive(Debug)]
struct Sum {
    builder: ProfileBuilder,
    header: Header,
}

/// What is known of the sum besides its samples.
#[derive(Debug)]
struct Header {
    sample_types: String,
    period_type: String,
    default_sample_type: String,
    doc_url: String,
    time_ns: i64,
    duration_ns: i64,
    period: i64,
}

impl Merger {
    /// Adds a profile. Every sample gets `labels` too, except those whose key it has already.
    ///
    /// # Errors
    /// For a profile that [`check()`] refuses or whose types differ from the first one's; the sum is then as it
    /// was before.
    pub fn add(&mut self, profile: &Profile, labels: &[LabelSpec<'_>]) -> Result<(), OpsError> {
        let index = self.profiles;
        check(profile).map_err(|source| OpsError::Invalid { index, source })?;
        let sum = match &mut self.sum {
            Some(sum) => sum,
            None => self.sum.insert(Sum::new(profile)),
        };
        sum.header.check_types(index, profile)?;
        sum.add(profile, labels);
        self.profiles += 1;
        Ok(())
    }

    /// How many profiles the sum holds.
    pub fn profiles(&self) -> usize {
        self.profiles
    }

    /// The sum.
    ///
    /// # Errors
    /// When nothing was added.
    pub fn finish(self) -> Result<Profile, OpsError> {
        let sum = self.sum.ok_or(OpsError::NoProfiles)?.finish();
        if !sum.sample.iter().any(is_zero) {
            return Ok(sum);
        }
        // Rows that became zero leave, with the locations only they had: adding skips them.
        let mut compact = Sum::new(&sum);
        compact.add(&sum, &[]);
        Ok(compact.finish())
    }
}

impl Sum {
    fn new(first: &Profile) -> Self {
        let types: Vec<TypeSpec<'_>> = first.sample_type.iter().map(|&t| type_spec(first, t)).collect();
        let mut builder =
            ProfileBuilder::new(&types, type_spec(first, first.period_type.unwrap_or_default()), 0);
        builder.frame_filters(text(first, first.drop_frames), text(first, first.keep_frames));
        Self { builder, header: Header::new(first) }
    }

    /// Adds a checked profile with equal types.
    fn add(&mut self, profile: &Profile, labels: &[LabelSpec<'_>]) {
        self.header.add(profile);
        for &comment in &profile.comment {
            self.builder.comment(text(profile, comment));
        }
        let mut import = Import { profile, locations: vec![None; profile.location.len()] };
        if let Some(main_binary) = profile.mapping.first() {
            // profile.proto wants the main binary first, also when the first sample is from elsewhere.
            self.builder.main_mapping(&mapping_spec(profile, main_binary));
        }
        for sample in profile.sample.iter().filter(|sample| !is_zero(sample)) {
            import.sample(&mut self.builder, sample, labels);
        }
    }

    fn finish(self) -> Profile {
        let Self { mut builder, header } = self;
        if !header.default_sample_type.is_empty() {
            builder.default_sample_type(&header.default_sample_type);
        }
        builder.doc_url(&header.doc_url);
        builder.time_ns(header.time_ns);
        builder.duration_ns(header.duration_ns);
        builder.period(header.period);
        builder.finish()
    }
}

impl Header {
    fn new(first: &Profile) -> Self {
        Self {
            sample_types: sample_types(first),
            period_type: period_type(first),
            default_sample_type: String::new(),
            doc_url: String::new(),
            time_ns: 0,
            duration_ns: 0,
            period: 0,
        }
    }

    fn check_types(&self, index: usize, profile: &Profile) -> Result<(), OpsError> {
        let (found, first) = (sample_types(profile), &self.sample_types);
        if found != *first {
            return Err(OpsError::SampleTypes { index, found, first: first.clone() });
        }
        let (found, first) = (period_type(profile), &self.period_type);
        if found != *first {
            return Err(OpsError::PeriodType { index, found, first: first.clone() });
        }
        Ok(())
    }

    fn add(&mut self, profile: &Profile) {
        self.time_ns = match (self.time_ns, profile.time_nanos) {
            (0, time) | (time, 0) => time,
            (a, b) => a.min(b),
        };
        self.duration_ns = self.duration_ns.saturating_add(profile.duration_nanos);
        self.period = self.period.max(profile.period);
        set_first(&mut self.default_sample_type, text(profile, profile.default_sample_type));
        set_first(&mut self.doc_url, text(profile, profile.doc_url));
    }
}

fn set_first(slot: &mut String, text: &str) {
    if slot.is_empty() {
        text.clone_into(slot);
    }
}

/// Carries the samples of one checked profile over to a builder.
struct Import<'a> {
    profile: &'a Profile,
    /// By index of the location in `profile`.
    locations: Vec<Option<LocationId>>,
}

impl<'a> Import<'a> {
    fn sample(&mut self, builder: &mut ProfileBuilder, sample: &Sample, extra: &[LabelSpec<'_>]) {
        let stack: Vec<LocationId> =
            sample.location_id.iter().filter_map(|&id| self.location(builder, id)).collect();
        let mut labels: Vec<LabelSpec<'_>> =
            sample.label.iter().map(|&label| label_spec(self.profile, label)).collect();
        let own = labels.len();
        for label in extra {
            if labels[..own].iter().all(|l| l.key != label.key) {
                labels.push(*label);
            }
        }
        builder.sample(&stack, &sample.value, &labels);
    }

    /// `None` only for an id the check refuses.
    fn location(&mut self, builder: &mut ProfileBuilder, id: u64) -> Option<LocationId> {
        let location = self.profile.location(id)?;
        let slot = self.locations.get_mut(usize::try_from(id.checked_sub(1)?).ok()?)?;
        Some(*slot.get_or_insert_with(|| import_location(builder, self.profile, location)))
    }
}

fn import_location(builder: &mut ProfileBuilder, profile: &Profile, location: &Location) -> LocationId {
    let mapping: Option<MappingId> =
        profile.mapping(location.mapping_id).map(|mapping| builder.mapping(&mapping_spec(profile, mapping)));
    let lines: Vec<LineSpec<'_>> =
        location.line.iter().filter_map(|&line| line_spec(profile, line)).collect();
    builder.location(&LocationSpec {
        mapping,
        address: location.address,
        kind: FrameKind::from_wire(location.kind).unwrap_or_default(),
        is_folded: location.is_folded,
        lines: &lines,
    })
}

fn mapping_spec<'a>(profile: &'a Profile, mapping: &Mapping) -> MappingSpec<'a> {
    MappingSpec {
        start: mapping.memory_start,
        limit: mapping.memory_limit,
        offset: mapping.file_offset,
        filename: text(profile, mapping.filename),
        build_id: text(profile, mapping.build_id),
    }
}

fn line_spec(profile: &Profile, line: Line) -> Option<LineSpec<'_>> {
    let function = profile.function(line.function_id)?;
    let function = FunctionSpec {
        name: text(profile, function.name),
        system_name: text(profile, function.system_name),
        filename: text(profile, function.filename),
        start_line: function.start_line,
    };
    Some(LineSpec { function, line: line.line, column: line.column })
}

fn label_spec(profile: &Profile, label: Label) -> LabelSpec<'_> {
    let value = match text(profile, label.str) {
        "" => LabelValue::Number(label.num, text(profile, label.num_unit)),
        text => LabelValue::Text(text),
    };
    LabelSpec { key: text(profile, label.key), value }
}

fn type_spec(profile: &Profile, value_type: ValueType) -> TypeSpec<'_> {
    TypeSpec::new(text(profile, value_type.r#type), text(profile, value_type.unit))
}

fn sample_types(profile: &Profile) -> String {
    let types: Vec<String> = profile.sample_type.iter().map(|&t| type_name(profile, t)).collect();
    types.join(" ")
}

fn period_type(profile: &Profile) -> String {
    type_name(profile, profile.period_type.unwrap_or_default())
}

fn type_name(profile: &Profile, value_type: ValueType) -> String {
    let TypeSpec { name, unit } = type_spec(profile, value_type);
    format!("{name}/{unit}")
}

/// The string of a checked profile.
fn text(profile: &Profile, index: i64) -> &str {
    profile.string(index).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{CPU, SAMPLES, cpu, profile};

    /// The samples as `leaf;caller value`, in order.
    fn rows(profile: &Profile) -> Vec<String> {
        let name = |&id: &u64| {
            let line = profile.location(id).and_then(|location| location.line.first()).expect("has a line");
            text(profile, profile.function(line.function_id).expect("checked").name)
        };
        let row = |sample: &Sample| {
            let stack: Vec<&str> = sample.location_id.iter().map(name).collect();
            format!("{} {:?}", stack.join(";"), sample.value)
        };
        profile.sample.iter().map(row).collect()
    }

    #[track_caller]
    fn refuse(result: Result<Profile, OpsError>, expect: &str) {
        assert_eq!(result.expect_err("must be refused").to_string(), expect);
    }

    #[test]
    fn equal_stacks_are_added_and_others_kept() {
        let a = cpu(&[(&["work", "main"], 5), (&["main"], 1)]);
        let b = cpu(&[(&["idle", "main"], 2), (&["work", "main"], 7)]);
        let sum = merge(&[&a, &b]).unwrap();
        assert_eq!(rows(&sum), ["work;main [12]", "main [1]", "idle;main [2]"]);
        assert_eq!(sum.function.len(), 3);
        assert_eq!(check(&sum), Ok(()));
    }

    #[test]
    fn a_profile_merged_alone_is_itself() {
        assert_eq!(merge(&[&profile()]).unwrap().to_string(), profile().to_string());
    }

    #[test]
    fn the_header_is_combined() {
        let header = |time, duration, period, comments: &[&str]| {
            let mut builder = ProfileBuilder::new(&[CPU], CPU, period);
            builder.time_ns(time);
            builder.duration_ns(duration);
            comments.iter().for_each(|comment| builder.comment(comment));
            builder.finish()
        };
        let mut b = header(50, 10, 3, &["b", "a"]);
        b.default_sample_type = b.sample_type[0].r#type;
        let sum = merge(&[&header(0, 5, 2, &["a"]), &b, &header(70, i64::MAX, 1, &["c"])]).unwrap();
        assert_eq!((sum.time_nanos, sum.duration_nanos, sum.period), (50, i64::MAX, 3));
        let comments: Vec<&str> = sum.comment.iter().map(|&c| text(&sum, c)).collect();
        assert_eq!(comments, ["a", "b", "c"]);
        assert_eq!(text(&sum, sum.default_sample_type), "cpu");
    }

    #[test]
    fn labels_keep_samples_apart_and_can_be_added() {
        let mut builder = ProfileBuilder::new(&[CPU], CPU, 1);
        builder.sample(&[], &[1], &[LabelSpec::text("comm", "a")]);
        builder.sample(&[], &[2], &[LabelSpec::text("comm", "b"), LabelSpec::text("pod", "own")]);
        let source = builder.finish();
        let mut merger = Merger::default();
        merger.add(&source, &[LabelSpec::text("pod", "p1")]).unwrap();
        merger.add(&source, &[LabelSpec::text("pod", "p2")]).unwrap();
        assert_eq!(merger.profiles(), 2);
        let sum = merger.finish().unwrap();
        let labels = |sample: &Sample| {
            let label = |l: &Label| format!("{}={}", text(&sum, l.key), text(&sum, l.str));
            (sample.label.iter().map(label).collect::<Vec<_>>().join(","), sample.value[0])
        };
        let expect = [
            ("comm=a,pod=p1".to_owned(), 1),
            ("comm=b,pod=own".to_owned(), 4),
            ("comm=a,pod=p2".to_owned(), 1),
        ];
        assert_eq!(sum.sample.iter().map(labels).collect::<Vec<_>>(), expect);
    }

    #[test]
    fn sums_saturate_instead_of_failing() {
        let big = cpu(&[(&["main"], i64::MAX - 1)]);
        assert_eq!(rows(&merge(&[&big, &big]).unwrap()), [format!("main [{}]", i64::MAX)]);
    }

    #[test]
    fn the_main_binary_stays_first_even_without_samples() {
        let mut other = profile();
        other.sample.retain(|sample| sample.location_id[0] == 2);
        other.sample[0].location_id.truncate(1);
        let sum = merge(&[&other, &profile()]).unwrap();
        assert_eq!(text(&sum, sum.mapping[0].filename), "/usr/bin/app");
    }

    #[test]
    fn what_cannot_be_merged_is_named() {
        let a = cpu(&[]);
        let named =
            |types: &[TypeSpec<'_>], period| merge(&[&a, &ProfileBuilder::new(types, period, 1).finish()]);
        refuse(merge(&[]), "there are no profiles to merge");
        refuse(
            named(&[SAMPLES, CPU], CPU),
            "profile 1 has sample types samples/count cpu/nanoseconds, the first has cpu/nanoseconds",
        );
        refuse(
            named(&[CPU], SAMPLES),
            "profile 1 has period type samples/count, the first has cpu/nanoseconds",
        );
        let mut broken = cpu(&[(&["main"], 1)]);
        broken.location[0].id = 7;
        refuse(merge(&[&a, &broken]), "profile 1 is not valid");
    }

    #[test]
    fn a_refused_profile_leaves_the_sum_as_it_was() {
        let mut merger = Merger::default();
        assert!(merger.add(&Profile::default(), &[]).is_err());
        merger.add(&cpu(&[(&["main"], 1)]), &[]).unwrap();
        let other = ProfileBuilder::new(&[SAMPLES], SAMPLES, 99).finish();
        assert!(merger.add(&other, &[]).is_err());
        assert_eq!(merger.profiles(), 1);
        assert_eq!(merger.finish().unwrap().to_string(), cpu(&[(&["main"], 1)]).to_string());
    }

    #[test]
    fn a_difference_keeps_what_changed_and_what_only_it_refers_to() {
        let a = cpu(&[(&["same", "main"], 5), (&["more", "main"], 7)]);
        let base = cpu(&[(&["same", "main"], 5), (&["more", "main"], 3), (&["gone", "main"], 2)]);
        let diff = diff(&a, &base).unwrap();
        assert_eq!(rows(&diff), ["more;main [4]", "gone;main [-2]"]);
        assert!(!diff.string_table.iter().any(|s| s == "same"), "{:?}", diff.string_table);
        assert_eq!(check(&diff), Ok(()));
    }

    #[test]
    fn a_difference_has_the_header_of_the_first() {
        let mut base = profile();
        base.time_nanos = 1;
        base.period *= 2;
        let diff = diff(&profile(), &base).unwrap();
        assert_eq!((diff.time_nanos, diff.duration_nanos), (profile().time_nanos, profile().duration_nanos));
        assert_eq!(diff.period, profile().period);
        assert_eq!(diff.sample, []);
    }

    #[test]
    fn the_smallest_number_has_no_opposite_and_saturates() {
        let base = cpu(&[(&["main"], i64::MIN)]);
        assert_eq!(rows(&diff(&cpu(&[]), &base).unwrap()), [format!("main [{}]", i64::MAX)]);
    }

    #[test]
    fn values_are_scaled_per_type_rounded_and_saturated() {
        #[track_caller]
        fn check(value: i64, ratio: f64, expect: i64) {
            assert_eq!(scale_value(value, ratio), expect, "{value} * {ratio}");
        }
        check(5, 0.5, 3);
        check(-5, 0.5, -3);
        check(i64::MAX - 1, 1.0, i64::MAX - 1);
        check(i64::MAX, 2.0, i64::MAX);
        check(i64::MIN, 2.0, i64::MIN);
        let mut scaled = profile();
        scale(&mut scaled, &[3.0, 1.0]).unwrap();
        assert_eq!(scaled.sample[0].value, [6, 105_263_156]);
    }

    #[test]
    fn rows_that_scale_to_zero_are_dropped() {
        let mut scaled = cpu(&[(&["a"], 1), (&["b"], 10)]);
        scale(&mut scaled, &[0.1]).unwrap();
        assert_eq!(rows(&scaled), ["b [1]"]);
    }

    #[test]
    fn ratios_are_one_finite_number_per_type() {
        let scaled = |ratios: &[f64]| scale(&mut profile(), ratios).map(|()| profile());
        refuse(scaled(&[1.0]), "1 ratios for 2 sample types");
        refuse(scaled(&[1.0, f64::NAN]), "ratio 1 is NaN, not a finite number");
        refuse(scaled(&[f64::INFINITY, 1.0]), "ratio 0 is inf, not a finite number");
    }
}
