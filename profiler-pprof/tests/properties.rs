//! What holds for every profile, and for every input that is none.

use profiler_pprof::proto::{Label, Profile, Sample};
use profiler_pprof::push::PushRequest;
use profiler_pprof::{
    DecodeLimits, FrameKind, FunctionSpec, LabelSpec, LabelValue, LineSpec, LocationSpec, MappingSpec,
    ProfileBuilder, TypeSpec, check, decode, diff, encode, encode_gzip, merge,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// What a builder is told, in a form that can be drawn and shrunk. Small pools make equal content likely.
#[derive(Clone, Debug)]
struct Plan {
    period: i64,
    time_ns: i64,
    duration_ns: i64,
    comments: Vec<&'static str>,
    samples: Vec<PlannedSample>,
}

#[derive(Clone, Debug)]
struct PlannedSample {
    stack: Vec<PlannedLocation>,
    values: [i64; 2],
    labels: Vec<(&'static str, PlannedLabel)>,
}

#[derive(Clone, Debug)]
enum PlannedLabel {
    Text(&'static str),
    Number(i64, &'static str),
}

#[derive(Clone, Debug)]
struct PlannedLocation {
    mapping: Option<(u64, u64, &'static str)>,
    address: u64,
    kind: FrameKind,
    is_folded: bool,
    lines: Vec<(&'static str, &'static str, i64)>,
}

fn name() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["", "main", "work", "r\u{e9}sum\u{e9}\n", "a<b>::{{closure}}", "\u{0}"])
}

fn location() -> impl Strategy<Value = PlannedLocation> {
    let kind = prop::sample::select(FrameKind::ALL.to_vec());
    let mapping = prop::option::of((0..3_u64, 0..3_u64, name()));
    let address = prop_oneof![0..3_u64, Just(u64::MAX)];
    let line = (name(), name(), prop_oneof![0..3_i64, Just(-1)]);
    (mapping, address, kind, any::<bool>(), vec(line, 0..3)).prop_map(
        |(mapping, address, kind, is_folded, lines)| PlannedLocation {
            mapping,
            address,
            kind,
            is_folded,
            lines,
        },
    )
}

fn label() -> impl Strategy<Value = (&'static str, PlannedLabel)> {
    let text = name().prop_map(PlannedLabel::Text);
    let number = (-2..2_i64, name()).prop_map(|(number, unit)| PlannedLabel::Number(number, unit));
    (name(), prop_oneof![text, number])
}

fn plan(value: impl Strategy<Value = i64> + Clone) -> impl Strategy<Value = Plan> {
    let sample = (vec(location(), 0..4), [value.clone(), value], vec(label(), 0..3))
        .prop_map(|(stack, values, labels)| PlannedSample { stack, values, labels });
    (0..9_i64, 0..9_i64, 0..9_i64, vec(name(), 0..3), vec(sample, 0..8)).prop_map(
        |(period, time_ns, duration_ns, comments, samples)| Plan {
            period,
            time_ns,
            duration_ns,
            comments,
            samples,
        },
    )
}

fn build(plan: &Plan) -> Profile {
    let cpu = TypeSpec::new("cpu", "nanoseconds");
    let mut builder = ProfileBuilder::new(&[TypeSpec::new("samples", "count"), cpu], cpu, plan.period);
    builder.time_ns(plan.time_ns);
    builder.duration_ns(plan.duration_ns);
    plan.comments.iter().for_each(|comment| builder.comment(comment));
    for PlannedSample { stack, values, labels } in &plan.samples {
        let stack: Vec<_> = stack.iter().map(|location| build_location(&mut builder, location)).collect();
        let labels: Vec<_> = labels.iter().map(label_spec).collect();
        builder.sample(&stack, values, &labels);
    }
    builder.finish()
}

fn build_location(builder: &mut ProfileBuilder, location: &PlannedLocation) -> profiler_pprof::LocationId {
    let PlannedLocation { mapping, address, kind, is_folded, lines } = location;
    let mapping = mapping.map(|(start, limit, filename)| {
        builder.mapping(&MappingSpec { start, limit, offset: 0, filename, build_id: "" })
    });
    let line = |&(name, filename, line): &(&'static str, &'static str, i64)| LineSpec {
        function: FunctionSpec { name, system_name: name, filename, start_line: 0 },
        line,
        column: 0,
    };
    let lines: Vec<_> = lines.iter().map(line).collect();
    let (address, kind, is_folded) = (*address, *kind, *is_folded);
    builder.location(&LocationSpec { mapping, address, kind, is_folded, lines: &lines })
}

fn label_spec(label: &(&'static str, PlannedLabel)) -> LabelSpec<'static> {
    let value = match label.1 {
        PlannedLabel::Text(text) => LabelValue::Text(text),
        PlannedLabel::Number(number, unit) => LabelValue::Number(number, unit),
    };
    LabelSpec { key: label.0, value }
}

/// The profile with nothing left that depends on the order of its tables.
fn canonical(profile: &Profile) -> Vec<String> {
    let mut rows: Vec<String> = profile.sample.iter().map(|sample| canonical_row(profile, sample)).collect();
    rows.sort_unstable();
    let mut comments: Vec<_> = profile.comment.iter().map(|&c| profile.string(c)).collect();
    comments.sort_unstable();
    let Profile { time_nanos, duration_nanos, period, .. } = profile;
    rows.push(format!("{time_nanos} {duration_nanos} {period} {comments:?}"));
    rows
}

fn canonical_row(profile: &Profile, sample: &Sample) -> String {
    let frame = |&id: &u64| {
        let location = profile.location(id).expect("checked");
        let mapping = profile
            .mapping(location.mapping_id)
            .map(|m| (m.memory_start, m.memory_limit, profile.string(m.filename)));
        let lines: Vec<_> = location
            .line
            .iter()
            .map(|line| {
                let function = profile.function(line.function_id).expect("checked");
                (profile.string(function.name), profile.string(function.filename), line.line)
            })
            .collect();
        (mapping, location.address, location.kind, location.is_folded, lines)
    };
    let stack: Vec<_> = sample.location_id.iter().map(frame).collect();
    let label = |l: &Label| (profile.string(l.key), profile.string(l.str), l.num, profile.string(l.num_unit));
    let mut labels: Vec<_> = sample.label.iter().map(label).collect();
    labels.sort_unstable();
    format!("{stack:?} {labels:?} {:?}", sample.value)
}

fn totals<'a>(profiles: impl IntoIterator<Item = &'a Profile>) -> [i128; 2] {
    let mut totals = [0; 2];
    for sample in profiles.into_iter().flat_map(|profile| &profile.sample) {
        totals.iter_mut().zip(&sample.value).for_each(|(total, &value)| *total += i128::from(value));
    }
    totals
}

fn summable() -> impl Strategy<Value = i64> + Clone {
    -3..100_i64
}

fn limits() -> DecodeLimits {
    DecodeLimits { inflated_bytes_max: 1 << 20, decoded_bytes_max: 1 << 24 }
}

/// Everything a reader does with bytes it does not trust.
fn read(bytes: &[u8]) {
    let Ok(profile) = decode(bytes, &limits()) else { return };
    let _ = profile.to_string();
    if check(&profile).is_ok() {
        merge(&[&profile]).expect("a valid profile can be merged");
    }
}

proptest! {
    #[test]
    fn what_is_built_is_valid_and_survives_the_wire(plan in plan(any::<i64>())) {
        let profile = build(&plan);
        prop_assert_eq!(check(&profile), Ok(()));
        prop_assert_eq!(&decode(&encode(&profile), &limits()).unwrap(), &profile);
        prop_assert_eq!(&decode(&encode_gzip(&profile), &limits()).unwrap(), &profile);
    }

    #[test]
    fn merging_is_associative_commutative_and_keeps_the_totals(
        a in plan(summable()), b in plan(summable()), c in plan(summable()),
    ) {
        let (a, b, c) = (build(&a), build(&b), build(&c));
        let sum = merge(&[&a, &b, &c]).unwrap();
        prop_assert_eq!(check(&sum), Ok(()));
        prop_assert_eq!(totals([&sum]), totals([&a, &b, &c]));
        let left = merge(&[&merge(&[&a, &b]).unwrap(), &c]).unwrap();
        let right = merge(&[&a, &merge(&[&b, &c]).unwrap()]).unwrap();
        let reverse = merge(&[&c, &b, &a]).unwrap();
        for other in [left, right, reverse] {
            prop_assert_eq!(canonical(&other), canonical(&sum));
        }
    }

    #[test]
    fn base_plus_difference_is_the_profile(a in plan(summable()), base in plan(summable())) {
        let (a, base) = (build(&a), build(&base));
        let difference = diff(&a, &base).unwrap();
        prop_assert_eq!(check(&difference), Ok(()));
        let rows = |profile: &Profile| {
            let mut rows = canonical(&merge(&[profile]).unwrap());
            rows.pop();
            rows
        };
        prop_assert_eq!(rows(&merge(&[&base, &difference]).unwrap()), rows(&a));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..512)) {
        read(&bytes);
        read(&[&[0x1f, 0x8b, 8, 0], &bytes[..]].concat());
        let _ = PushRequest::from_bytes(&bytes);
    }

    #[test]
    fn changed_bytes_never_panic(
        plan in plan(any::<i64>()), changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = encode(&build(&plan));
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        read(&bytes);
    }

    #[test]
    fn a_cut_gzip_stream_is_an_error_and_a_cut_protobuf_never_panics(
        plan in plan(any::<i64>()), cut in any::<prop::sample::Index>(),
    ) {
        let profile = build(&plan);
        let (plain, gzip) = (encode(&profile), encode_gzip(&profile));
        read(&plain[..cut.index(plain.len())]);
        prop_assert!(decode(&gzip[..2 + cut.index(gzip.len() - 2)], &limits()).is_err());
    }
}
