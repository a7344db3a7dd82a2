//! Tables of small files: which source is used, what each form of call frame information becomes, and what hostile
//! files cost.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::elf_file::{EM_AARCH64, ElfFile, Frames};
use profiler_common::unwind::{UnwindRule, x86_64};
use profiler_unwind::{Inexpressible, Source, UnwindError, UnwindTable, from_elf, limits, vdso};

fn file(eh_frame: Vec<u8>) -> ElfFile {
    ElfFile { eh_frame, ..ElfFile::default() }
}

#[track_caller]
fn table(file: &ElfFile) -> UnwindTable {
    from_elf(&file.bytes()).unwrap_or_else(|error| panic!("{error}: {error:?}"))
}

/// `push rbp; mov rbp, rsp; ..; pop rbp; ret`.
const WITH_FRAME_POINTER: &[u8] = &[0x41, 0x0e, 16, 0x86, 2, 0x43, 0x0d, 6, 0x02, 0x40, 0x0c, 7, 8];

#[test]
fn functions_of_a_compiler_have_the_rules_of_their_frames() {
    let frames = Frames::x86_64()
        .fde(0x2000, 0x100, WITH_FRAME_POINTER)
        // sub rsp, 0x12345678.
        .fde(0x2100, 0x40, &[0x44, 0x0e, 0x80, 0xad, 0xd1, 0x91, 0x01])
        // DRAP: r10 holds the CFA, then a slot at rbp-8 does; rbp is saved where it points.
        .fde(0x2140, 0x40, &[0x45, 0x0c, 10, 0, 0x50, 0x10, 6, 2, 0x76, 0, 0x45, 0x0f, 3, 0x76, 0x78, 0x06])
        // OpenSSL: CFA = *(rsp + 24) + 56.
        .fde(0x2180, 0x40, &[0x41, 0x0f, 5, 0x77, 24, 0x06, 0x23, 56])
        // binutils' lazy PLT.
        .fde(0x21c0, 0x40, &[0x0f, 11, 0x77, 8, 0x80, 0, 0x3f, 0x1a, 0x3b, 0x2a, 0x33, 0x24, 0x22])
        // The return address is undefined.
        .fde(0x2200, 0x40, &[0x07, 16])
        // rbp far from the CFA, then undefined.
        .fde(0x2240, 0x40, &[0x05, 6, 100, 0x44, 0x07, 6])
        // push rbx; a function of its own kind that saves it farther away; one that keeps it in another register.
        .fde(0x2280, 0x10, &[0x41, 0x0e, 16, 0x83, 2])
        .fde(0x2290, 0x10, &[0x83, 9])
        .fde(0x22a0, 0x10, &[0x09, 3, 12]);
    insta::assert_snapshot!(table(&file(frames.finish())), @r"
        1000 gap
        2000 cfa=rsp+8
        2001 cfa=rsp+16 rbp=[cfa-16]
        2004 cfa=rbp+16 rbp=[cfa-16]
        2044 cfa=rsp+8 rbp=[cfa-16]
        2100 cfa=rsp+8
        2104 cfa=rsp+305419904
        2140 cfa=rsp+8
        2145 cfa=r10+0
        2155 cfa=r10+0 rbp=[rbp+0]
        215a cfa=[rbp-8]+0 rbp=[rbp+0]
        2180 cfa=rsp+8
        2181 cfa=[rsp+24]+56
        21c0 cfa=rsp+8 or rsp+16 from byte 11
        2200 end
        2240 cfa=rsp+8 rbp=[cfa-800]
        2244 cfa=rsp+8 rbp=undefined
        2280 cfa=rsp+8
        2281 cfa=rsp+16 rbx=[cfa-16]
        2290 cfa=rsp+8 rbx=lost
        22b0 gap
    ");
}

#[test]
fn functions_of_aarch64_have_the_rules_of_their_frames() {
    // CFA = sp+0, return address in x30.
    let frames = Frames::eh()
        .cie("zR", 30, &[0x0c, 31, 0])
        // stp x29, x30, [sp, -32]!; mov x29, sp; sub sp by a variable.
        .fde(0x2000, 0x40, &[0x44, 0x0e, 32, 0x9d, 4, 0x9e, 3, 0x44, 0x0d, 29])
        // str x30, [sp, -16]!.
        .fde(0x2040, 0x40, &[0x44, 0x0e, 16, 0x9e, 2])
        // paciasp: DW_CFA_AARCH64_negate_ra_state.
        .fde(0x2080, 0x40, &[0x44, 0x2d, 0x44, 0x0e, 16, 0x9d, 2, 0x9e, 1])
        .fde(0x20c0, 0x40, &[0x07, 30])
        // x29 and x30 apart.
        .fde(0x2100, 0x40, &[0x44, 0x0e, 64, 0x9d, 7, 0x9e, 5])
        // A CFA on x16.
        .fde(0x2140, 0x40, &[0x0c, 16, 0])
        // The kernel's signal frame.
        .cie("zRS", 30, &[0x0c, 29, 0, 0x9d, 0, 0x11, 30, 0x7f])
        .fde(0x2180, 0x10, &[]);
    let elf = ElfFile { machine: EM_AARCH64, ..file(frames.finish()) };
    insta::assert_snapshot!(table(&elf), @r"
        1000 gap
        2000 cfa=sp+0 ra=x30
        2004 cfa=sp+32 x29=[cfa-32] ra=[cfa-24]
        2008 cfa=x29+32 x29=[cfa-32] ra=[cfa-24]
        2040 cfa=sp+0 ra=x30
        2044 cfa=sp+16 ra=[cfa-16]
        2080 cfa=sp+0 ra=x30
        2088 cfa=sp+16 x29=[cfa-16] ra=[cfa-8]
        20c0 end
        2100 cfa=sp+0 ra=x30
        2104 cfa=sp+64 x29=[cfa-56] ra=[cfa-40]
        2140 invalid
        2180 signal frame
        2190 gap
    ");
}

fn reasons(table: &UnwindTable) -> Vec<(&'static str, u64)> {
    let counts = table.counts().inexpressible_rows;
    let reasons = Inexpressible::ALL.iter().zip(counts).filter(|&(_, rows)| rows > 0);
    reasons.map(|(reason, rows)| (reason.name(), rows)).collect()
}

#[test]
fn what_no_rule_can_express_is_invalid_and_counted_by_reason() {
    let frames = Frames::x86_64()
        // CFA on xmm0.
        .fde(0x2000, 0x10, &[0x0c, 17, 8])
        // CFA = *(rsp + 8) + 3.
        .fde(0x2010, 0x10, &[0x0f, 5, 0x77, 8, 0x06, 0x23, 3])
        // The return address at CFA-16, then in rax.
        .fde(0x2020, 0x10, &[0x90, 2, 0x44, 0x09, 16, 0])
        // rbp in rbx; rbp saved where rsp points.
        .fde(0x2030, 0x10, &[0x09, 6, 3, 0x44, 0x10, 6, 2, 0x77, 0])
        // CFA = rsp + 2^32.
        .fde(0x2040, 0x10, &[0x0e, 0x80, 0x80, 0x80, 0x80, 0x10])
        // An instruction that there is none of.
        .fde(0x2050, 0x10, &[0x44, 0x3b])
        .cie("zRS", 16, &[0x0c, 7, 8, 0x90, 1])
        .fde(0x2060, 0x10, &[]);
    let table = table(&file(frames.finish()));
    let expect = [
        ("cfa_register", 1),
        ("cfa_expression", 1),
        ("return_address", 2),
        ("frame_pointer", 2),
        ("offset", 1),
        ("signal_frame", 1),
        ("instructions", 1),
    ];
    assert_eq!(reasons(&table), expect);
    assert_eq!(table.counts().inexpressible_fdes, 7);
    for address in 0x2000..0x2070 {
        assert_eq!(table.find(address), Some(&UnwindRule::INVALID), "{address:#x}");
    }
}

#[test]
fn the_kernels_signal_frame_is_recognized_by_where_it_keeps_rip() {
    // glibc's __restore_rt: CFA = *(rsp + 160), rip at rsp + 168.
    let frames = Frames::eh().cie("zRS", 16, &[]).fde(
        0x2000,
        0x10,
        &[0x0f, 4, 0x77, 0xa0, 0x01, 0x06, 0x10, 16, 3, 0x77, 0xa8, 0x01],
    );
    assert_eq!(table(&file(frames.finish())).find(0x2000), Some(&UnwindRule::SIGNAL));
}

#[test]
fn a_file_without_section_table_is_read_by_its_program_headers() {
    let eh_frame = Frames::x86_64().fde(0x2000, 0x100, WITH_FRAME_POINTER).finish();
    let by_section = table(&file(eh_frame.clone()));
    let by_header = table(&ElfFile { section_table: false, ..file(eh_frame) });
    assert_eq!((by_section.source(), by_header.source()), (Source::EhFrame, Source::EhFrameHdr));
    assert_eq!(by_section.to_string(), by_header.to_string());
}

#[test]
fn debug_frame_is_used_where_eh_frame_says_nothing() {
    let debug_frame =
        Frames::debug().cie("", 16, &[0x0c, 7, 8, 0x90, 1]).fde(0x2000, 0x100, WITH_FRAME_POINTER).finish();
    let only_debug = ElfFile { debug_frame, ..ElfFile::default() };
    let found = table(&only_debug);
    assert_eq!((found.source(), found.counts().fdes), (Source::DebugFrame, 1));
    assert_eq!(found.find(0x2010), Some(&UnwindRule { scale: x86_64::RBX_SAME, ..x86_64::FRAME_POINTER }));

    let eh_frame = Frames::x86_64().fde(0x3000, 0x10, &[]).finish();
    let both = table(&ElfFile { eh_frame, ..only_debug });
    assert_eq!((both.source(), both.find(0x2010)), (Source::EhFrame, Some(&UnwindRule::GAP)));
}

#[test]
fn go_code_has_frame_pointers_except_where_c_code_says_otherwise() {
    let sections = vec![(".go.buildinfo", 0x20_0000, 16)];
    let pure = table(&ElfFile { sections: sections.clone(), ..ElfFile::default() });
    assert_eq!((pure.source(), pure.counts().rows), (Source::Go, 1));
    assert_eq!(pure.find(0x1000), Some(&x86_64::FRAME_POINTER.elsewhere()));

    let eh_frame = Frames::x86_64().fde(0x2000, 0x100, WITH_FRAME_POINTER).finish();
    let cgo = table(&ElfFile { sections, ..file(eh_frame) });
    assert_eq!(cgo.source(), Source::Go);
    assert_eq!(cgo.find(0x2000).map(|rule| rule.cfa_offset), Some(8));
    assert_eq!(cgo.find(0x2100), Some(&x86_64::FRAME_POINTER.elsewhere()));
}

#[test]
fn a_file_without_any_source_has_no_table() {
    let error = from_elf(&ElfFile::default().bytes()).unwrap_err();
    assert!(matches!(error, UnwindError::NoUnwindInformation), "{error:?}");
}

#[test]
fn an_entry_point_and_stubs_without_unwind_information_are_known_code() {
    let eh_frame = Frames::x86_64().fde(0x2000, 0x100, &[]).finish();
    let sections = vec![(".plt", 0x1020, 0x40)];
    let table = table(&ElfFile { entry: 0x2200, sections, ..file(eh_frame) });
    insta::assert_snapshot!(table, @r"
        1000 gap
        1020 cfa=rsp+8 or rsp+16 from byte 11
        1060 gap
        2000 cfa=rsp+8
        2100 gap
        2200 end
        221a gap
    ");
}

/// Functions of a static musl, none of which has unwind information.
fn static_musl(symbols: Vec<(&'static str, u64, u64)>) -> ElfFile {
    let eh_frame = Frames::x86_64().fde(0x2000, 0x100, &[]).finish();
    ElfFile { entry: 0x5000, symbols, ..file(eh_frame) }
}

#[test]
fn the_first_functions_and_the_signal_trampoline_of_a_static_musl_are_known_by_name() {
    let symbols = vec![
        ("start", 0x2200, 0x80),
        ("libc_start_main_stage2", 0x2400, 0x40),
        ("__restore_rt", 0x2500, 9),
        ("start_of_mine", 0x2600, 0x80),
        ("start_c11", 0x2700, limits::KNOWN_FUNCTION_BYTES_MAX + 1),
    ];
    insta::assert_snapshot!(table(&static_musl(symbols)), @r"
        1000 gap
        2000 cfa=rsp+8
        2100 gap
        2200 end
        2280 gap
        2400 end
        2440 gap
        24ff signal frame
        2509 gap
        5000 end
        501a gap
    ");
}

#[test]
fn a_function_called_start_is_nothing_special_without_musl() {
    let table = table(&static_musl(vec![("start", 0x2200, 0x80), ("__restore_rt", 0x2500, 9)]));
    assert_eq!(table.find(0x2200), Some(&UnwindRule::GAP));
    assert_eq!(table.find(0x2500), Some(&UnwindRule::GAP));
}

#[test]
fn symbols_that_lie_are_no_code() {
    let symbols = vec![
        ("libc_start_main_stage2", u64::MAX - 4, 100),
        ("start", 0, 100),
        ("start_c11", 0x2080, 0x100),
        ("__restore_rt", 0, 9),
    ];
    let table = table(&static_musl(symbols));
    // Unwind information comes first.
    assert_eq!(table.find(0x2080).map(|rule| rule.cfa_offset), Some(8));
    assert_eq!(table.find(0x2100), Some(&UnwindRule::GAP));
}

#[test]
fn a_section_that_is_elsewhere_than_its_header_says_is_one_error_or_none() {
    let bytes = static_musl(vec![("start", 0x2200, 0x80)]).bytes();
    let headers = u64::from_le_bytes(bytes[40..48].try_into().expect("8 bytes")) as usize;
    let far = [0, 1, 63, 0x40, bytes.len() as u64 - 1, bytes.len() as u64, u64::MAX - 7, u64::MAX];
    // Each of flags, address, offset, size, link, alignment and entry size of each header.
    for field in (headers + 8..bytes.len() - 7).step_by(8) {
        for value in far {
            let mut lying = bytes.clone();
            lying[field..field + 8].copy_from_slice(&value.to_le_bytes());
            if let Ok(table) = from_elf(&lying) {
                assert!(table.rows().is_sorted_by(|a, b| a.0 < b.0), "{field}: {value:#x}");
            }
        }
    }
}

#[test]
fn an_augmentation_longer_than_its_entry_is_one_error() {
    // "zR" with 2^63 - 1 bytes of it, as LEB128.
    let mut body = vec![0, 0, 0, 0, 1, b'z', b'R', 0, 1, 0x78, 16];
    body.extend([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 4]);
    let cie = [&(body.len() as u32).to_le_bytes()[..], &body].concat();
    let frames = Frames::x86_64().fde(0x2000, 0x10, &[]).raw(&cie);
    let error = from_elf(&file(frames.finish()).bytes()).unwrap_err();
    assert!(matches!(error, UnwindError::Malformed { section: ".eh_frame", .. }), "{error:?}");
}

#[test]
fn functions_that_all_cover_the_same_code_are_one_row_each_at_most() {
    let rows = [0x41, 0x0e, 16].repeat(100);
    let frames = (0..2000).fold(Frames::x86_64(), |frames, _| frames.fde(0x2000, 0x1000, &rows));
    let table = table(&file(frames.finish()));
    assert!(table.counts().rows <= 2 + 100, "{:?}", table.counts());
}

#[test]
fn the_vdso_of_this_process_has_a_table_with_and_without_its_section_table() {
    let mut image = own_vdso();
    let by_section = vdso::from_image(&image).unwrap();
    assert!(by_section.counts().fdes > 3, "{:?}", by_section.counts());
    // e_shoff and e_shnum.
    image[0x28..0x30].fill(0);
    image[0x3c..0x3e].fill(0);
    let by_header = vdso::from_image(&image).unwrap();
    assert_eq!(by_header.source(), Source::EhFrameHdr);
    assert_eq!(by_section.to_string(), by_header.to_string());
}

fn own_vdso() -> Vec<u8> {
    let read = || -> Option<Vec<u8>> {
        let maps = fs::read_to_string("/proc/self/maps").ok()?;
        let line = maps.lines().find(|line| line.ends_with("[vdso]"))?;
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        let mut image = vec![0; (address(end)? - address(start)?) as usize];
        File::open("/proc/self/mem").ok()?.read_exact_at(&mut image, address(start)?).ok()?;
        Some(image)
    };
    read().expect("the kernel maps a vDSO into every process")
}

#[test]
fn a_vdso_of_any_size_is_not_read() {
    let error = vdso::from_image(&vec![0; limits::VDSO_BYTES_MAX + 1]).unwrap_err();
    assert!(matches!(error, UnwindError::VdsoTooLarge { .. }), "{error:?}");
}

#[test]
fn a_file_cut_anywhere_gives_a_table_or_an_error() {
    let eh_frame = Frames::x86_64().fde(0x2000, 0x100, WITH_FRAME_POINTER).fde(0x2200, 0x10, &[]).finish();
    let bytes = file(eh_frame).bytes();
    let errors = (0..bytes.len()).filter(|&length| from_elf(&bytes[..length]).is_err()).count();
    assert!(errors > 64, "{errors} of {} cuts", bytes.len());
}

#[test]
fn a_list_of_entries_that_breaks_off_is_one_error() {
    let frames = Frames::x86_64().fde(0x2000, 0x10, &[]).raw(&1000u32.to_le_bytes());
    let error = from_elf(&file(frames.finish()).bytes()).unwrap_err();
    assert!(matches!(error, UnwindError::Malformed { section: ".eh_frame", .. }), "{error:?}");
}

#[test]
fn a_cie_of_unknown_form_is_one_error() {
    let frames = Frames::x86_64().fde(0x2000, 0x10, &[]).cie("eh", 16, &[]);
    let error = from_elf(&file(frames.finish()).bytes()).unwrap_err();
    assert!(matches!(error, UnwindError::Malformed { .. }), "{error:?}");
}

#[test]
fn an_entry_that_names_no_cie_is_counted() {
    // Its CIE pointer leads to itself.
    let lost = [24u32.to_le_bytes(), 4u32.to_le_bytes()].concat();
    let frames = Frames::x86_64().fde(0x2000, 0x10, &[]).raw(&lost).raw(&[0; 20]);
    let table = table(&file(frames.fde(0x2100, 0x10, &[]).finish()));
    assert_eq!((table.counts().fdes, table.counts().malformed_fdes), (3, 1));
    assert_eq!(table.find(0x2000).map(|rule| rule.cfa_offset), Some(8));
    assert_eq!(table.find(0x2100).map(|rule| rule.cfa_offset), Some(8));
}

#[test]
fn files_of_other_machines_and_no_files_at_all_are_refused() {
    let other = ElfFile { machine: 243, ..file(Frames::x86_64().fde(0x2000, 0x10, &[]).finish()) };
    assert!(matches!(from_elf(&other.bytes()), Err(UnwindError::Machine { machine: 243 })));
    assert!(matches!(from_elf(b""), Err(UnwindError::Headers(_))));
    assert!(matches!(from_elf(b"#!/bin/sh\n"), Err(UnwindError::Headers(_))));
}

#[test]
fn code_without_end_is_refused() {
    let far = ElfFile { code: 0x1000..0x1000 + (8 << 30), ..file(Frames::x86_64().finish()) };
    assert!(matches!(from_elf(&far.bytes()), Err(UnwindError::CodeTooLarge { .. })));
    let none = ElfFile { code: 0x1000..0x1000, ..far };
    assert!(matches!(from_elf(&none.bytes()), Err(UnwindError::NoCode)));
}

#[test]
fn rows_without_end_are_refused() {
    // Each byte is DW_CFA_advance_loc by one: a row a byte.
    let rows = vec![0x41; limits::ROWS_MAX + 1];
    let code = 0x1000..0x1000 + 2 * limits::ROWS_MAX as u64;
    let frames = Frames::x86_64().fde(0x1000, code.end - code.start, &rows);
    let error = from_elf(&ElfFile { code, ..file(frames.finish()) }.bytes()).unwrap_err();
    assert!(matches!(error, UnwindError::TooManyRows { .. }), "{error:?}");
}

#[test]
fn entries_without_end_are_refused() {
    // The smallest FDE: a CIE without augmentation has 8-byte addresses and no length of augmentation.
    let mut frames = Frames::eh().cie("", 16, &[0x0c, 7, 8, 0x90, 1]).finish();
    frames.truncate(frames.len() - 4);
    let mut fde = 20u32.to_le_bytes().to_vec();
    fde.extend([0; 20]);
    for _ in 0..=limits::FDES_MAX {
        let cie = frames.len() as u32 + 4;
        fde[4..8].copy_from_slice(&cie.to_le_bytes());
        frames.extend(&fde);
    }
    let error = from_elf(&file(frames).bytes()).unwrap_err();
    assert!(matches!(error, UnwindError::TooManyFdes { .. }), "{error:?}");
}

#[test]
fn entries_that_repeat_a_long_cie_are_refused() {
    let mut frames = Frames::eh().cie("zR", 16, &vec![0; 1 << 20]);
    for at in 0..300 {
        frames = frames.fde(0x2000 + at * 16, 16, &[]);
    }
    let error = from_elf(&file(frames.finish()).bytes()).unwrap_err();
    assert!(matches!(error, UnwindError::TooMuchWork { .. }), "{error:?}");
}

#[test]
fn a_location_set_beyond_the_function_ends_its_rows() {
    // DW_CFA_set_loc, twice: within, and far behind the end.
    let mut instructions = vec![0x01];
    instructions.extend(0x2008u64.to_le_bytes());
    instructions.extend([0x0e, 16, 0x01]);
    instructions.extend(0x9000u64.to_le_bytes());
    instructions.extend([0x0e, 24]);
    let table = table(&file(Frames::x86_64().fde(0x2000, 0x10, &instructions).finish()));
    let rows: Vec<_> = table.rows().map(|(address, rule)| (address, rule.cfa_offset)).collect();
    assert_eq!(rows, [(0x1000, 0), (0x2000, 8), (0x2008, 16), (0x2010, 0)]);
}

#[test]
#[ignore = "needs go"]
fn a_go_program_is_recognized_even_when_stripped() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("main.go");
    fs::write(&source, "package main\nfunc main() { println(1) }\n").unwrap();
    for flags in ["", "-s -w"] {
        let program = dir.path().join("program");
        let status = Command::new("go")
            .args(["build", "-ldflags", flags, "-o"])
            .args([&program, &source])
            .env("CGO_ENABLED", "0")
            .env("GOFLAGS", "-mod=mod")
            .status();
        assert!(status.unwrap().success());
        let mut bytes = fs::read(&program).unwrap();
        assert_eq!(from_elf(&bytes).unwrap().source(), Source::Go, "{flags:?}");
        bytes[0x28..0x30].fill(0);
        bytes[0x3c..0x3e].fill(0);
        assert_eq!(from_elf(&bytes).unwrap().source(), Source::Go, "{flags:?}, no section table");
    }
}
