//! One valid profile with everything in it, for the tests of this crate.

use crate::proto::Profile;
use crate::{
    FrameKind, FunctionSpec, LabelSpec, LabelValue, LineSpec, LocationSpec, MappingSpec, ProfileBuilder,
    TypeSpec,
};

pub(crate) const CPU: TypeSpec<'_> = TypeSpec::new("cpu", "nanoseconds");
pub(crate) const SAMPLES: TypeSpec<'_> = TypeSpec::new("samples", "count");

pub(crate) fn function<'a>(name: &'a str, filename: &'a str) -> FunctionSpec<'a> {
    FunctionSpec { name, system_name: name, filename, start_line: 0 }
}

/// A location without a mapping, at line 1 of the function.
pub(crate) fn plain(builder: &mut ProfileBuilder, name: &str) -> crate::LocationId {
    let lines = [LineSpec { function: function(name, "app.c"), line: 1, column: 0 }];
    let kind = FrameKind::Unspecified;
    builder.location(&LocationSpec { mapping: None, address: 0, kind, is_folded: false, lines: &lines })
}

/// A profile of `cpu` with one sample per (stack of function names leaf first, nanoseconds).
pub(crate) fn cpu(samples: &[(&[&str], i64)]) -> Profile {
    let mut builder = ProfileBuilder::new(&[CPU], CPU, 1);
    for (stack, ns) in samples {
        let stack: Vec<_> = stack.iter().map(|name| plain(&mut builder, name)).collect();
        builder.sample(&stack, &[*ns], &[]);
    }
    builder.finish()
}

pub(crate) fn profile() -> Profile {
    let mut builder = ProfileBuilder::new(&[SAMPLES, CPU], CPU, 52_631_578);
    builder.default_sample_type("cpu");
    builder.comment("19 Hz");
    builder.time_ns(1_700_000_000_000_000_000);
    builder.duration_ns(10_000_000_000);
    builder.doc_url("https://example.org/cpu");

    let app = builder.mapping(&MappingSpec {
        start: 0x40_0000,
        limit: 0x50_0000,
        offset: 0x1000,
        filename: "/usr/bin/app",
        build_id: "c0ffee",
    });
    let kernel = builder.mapping(&MappingSpec {
        start: 0xffff_ffff_8100_0000,
        limit: 0xffff_ffff_8200_0000,
        offset: 0,
        filename: "[kernel.kallsyms]",
        build_id: "",
    });
    let inner =
        FunctionSpec { name: "inner<T>()", system_name: "_Z5innerv", filename: "app.cc", start_line: 10 };
    let inlined = builder.location(&LocationSpec {
        mapping: Some(app),
        address: 0x40_1000,
        kind: FrameKind::Native,
        is_folded: true,
        lines: &[
            LineSpec { function: inner, line: 12, column: 3 },
            LineSpec { function: function("outer", "app.cc"), line: 40, column: 0 },
        ],
    });
    let read = builder.location(&LocationSpec {
        mapping: Some(kernel),
        address: 0xffff_ffff_8100_1234,
        kind: FrameKind::Unspecified,
        is_folded: false,
        lines: &[LineSpec { function: function("vfs_read", ""), line: 0, column: 0 }],
    });
    let unknown = builder.location(&LocationSpec {
        mapping: Some(app),
        address: 0x40_2000,
        kind: FrameKind::Native,
        is_folded: false,
        lines: &[],
    });
    let cut = builder.location(&LocationSpec {
        mapping: None,
        address: 0,
        kind: FrameKind::Marker,
        is_folded: false,
        lines: &[LineSpec { function: function("[truncated]", ""), line: 0, column: 0 }],
    });
    let size = LabelSpec { key: "size", value: LabelValue::Number(64, "bytes") };
    let comm = LabelSpec::text("comm", "app");
    builder.sample(&[inlined, unknown], &[2, 105_263_156], &[comm, LabelSpec::number("pid", 42)]);
    builder.sample(&[read, inlined, cut], &[1, 52_631_578], &[comm, size]);
    builder.finish()
}
