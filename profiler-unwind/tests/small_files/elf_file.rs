//! Writes small ELF files with call frame information, sound or not.
//!
//! Source: System V ABI, chapters 4 and 5; Linux Standard Base Core 5.0 §10.6.

use std::ops::Range;

pub(crate) const EM_X86_64: u16 = 62;
pub(crate) const EM_AARCH64: u16 = 183;

/// Where `.eh_frame` and its header are loaded.
const EH_FRAME: u64 = 0x100_0000;
const EH_FRAME_HDR: u64 = 0x200_0000;

#[derive(Clone)]
pub(crate) struct ElfFile {
    pub(crate) machine: u16,
    pub(crate) entry: u64,
    pub(crate) code: Range<u64>,
    pub(crate) eh_frame: Vec<u8>,
    pub(crate) debug_frame: Vec<u8>,
    /// Further sections: name, address, size.
    pub(crate) sections: Vec<(&'static str, u64, usize)>,
    /// Functions of `.symtab`: name, address, size.
    pub(crate) symbols: Vec<(&'static str, u64, u64)>,
    /// With it, sections can be found by name.
    pub(crate) section_table: bool,
}

impl Default for ElfFile {
    fn default() -> Self {
        Self {
            machine: EM_X86_64,
            entry: 0,
            code: 0x1000..0x10_0000,
            eh_frame: Vec::new(),
            debug_frame: Vec::new(),
            sections: Vec::new(),
            symbols: Vec::new(),
            section_table: true,
        }
    }
}

struct Segment {
    p_type: u32,
    flags: u32,
    address: u64,
    bytes: Range<u64>,
    memory: u64,
}

impl ElfFile {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut file = vec![0; 64 + 3 * 56];
        let mut append = |bytes: &[u8]| {
            let start = file.len() as u64;
            file.extend(bytes);
            start..file.len() as u64
        };
        let eh_frame = append(&self.eh_frame);
        let debug_frame = append(&self.debug_frame);
        // Version 1; eh_frame_ptr as an absolute 8-byte address; no table.
        let header = append(&[&[1, 0x04, 0xff, 0xff][..], &EH_FRAME.to_le_bytes()].concat());
        let mut sections = vec![(".eh_frame", EH_FRAME, eh_frame.clone())];
        if !self.debug_frame.is_empty() {
            sections.push((".debug_frame", 0, debug_frame));
        }
        for &(name, address, size) in &self.sections {
            sections.push((name, address, append(&vec![0; size])));
        }
        if !self.symbols.is_empty() {
            let (names, symbols) = symbol_table(&self.symbols);
            // The header before the symbols' is their names'.
            sections.push((".strtab", 0, append(&names)));
            sections.push((".symtab", 0, append(&symbols)));
        }
        let load =
            |flags, address, bytes: Range<u64>, memory| Segment { p_type: 1, flags, address, bytes, memory };
        let size = eh_frame.end - eh_frame.start;
        let segments = [
            load(5, self.code.start, 0..0, self.code.end - self.code.start),
            load(4, EH_FRAME, eh_frame, size),
            Segment { p_type: 0x6474_e550, ..load(4, EH_FRAME_HDR, header, 12) },
        ];
        let section_headers =
            if self.section_table { Some(append_sections(&mut file, &sections)) } else { None };
        self.write_headers(&mut file, &segments, section_headers);
        file
    }

    fn write_headers(&self, file: &mut [u8], segments: &[Segment; 3], sections: Option<(u64, u16)>) {
        let (shoff, shnum) = sections.unwrap_or((0, 0));
        let mut head = Vec::new();
        head.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for half in [3, self.machine] {
            head.extend(half.to_le_bytes());
        }
        head.extend(1u32.to_le_bytes());
        for word in [self.entry, 64, shoff] {
            head.extend(word.to_le_bytes());
        }
        head.extend(0u32.to_le_bytes());
        for half in [64, 56, 3, 64, shnum, shnum.saturating_sub(1)] {
            head.extend(half.to_le_bytes());
        }
        for segment in segments {
            head.extend(segment.p_type.to_le_bytes());
            head.extend(segment.flags.to_le_bytes());
            let size = segment.bytes.end - segment.bytes.start;
            for word in [segment.bytes.start, segment.address, segment.address, size, segment.memory, 1] {
                head.extend(word.to_le_bytes());
            }
        }
        file[..head.len()].copy_from_slice(&head);
    }
}

/// Names and entries. Source: System V ABI, chapter 4: Elf64_Sym.
fn symbol_table(functions: &[(&str, u64, u64)]) -> (Vec<u8>, Vec<u8>) {
    let (mut names, mut symbols) = (vec![0], vec![0; 24]);
    for &(name, address, size) in functions {
        symbols.extend((names.len() as u32).to_le_bytes());
        // STT_FUNC, local; in the first section.
        symbols.extend([2, 0, 1, 0]);
        symbols.extend(address.to_le_bytes());
        symbols.extend(size.to_le_bytes());
        names.extend(name.bytes().chain([0]));
    }
    (names, symbols)
}

/// Appends names and headers of sections; gives the headers' place and number.
fn append_sections(file: &mut Vec<u8>, sections: &[(&str, u64, Range<u64>)]) -> (u64, u16) {
    let names_start = file.len() as u64;
    file.push(0);
    let mut headers = vec![[0u64; 5]];
    for (name, address, bytes) in sections {
        let at = file.len() as u64 - names_start;
        file.extend(name.bytes().chain([0]));
        let kind = match *name {
            ".symtab" => 2,
            ".strtab" => 3,
            _ => 1,
        };
        headers.push([at, kind, *address, bytes.start, bytes.end - bytes.start]);
    }
    headers.push([0, 3, 0, names_start, file.len() as u64 - names_start]);
    let place = file.len() as u64;
    for (number, [name, kind, address, offset, size]) in headers.iter().enumerate() {
        let (link, entry_bytes) = if *kind == 2 { (number as u64 - 1, 24) } else { (0, 0) };
        file.extend((*name as u32).to_le_bytes());
        file.extend((*kind as u32).to_le_bytes());
        for word in [0, *address, *offset, *size, link, 1, entry_bytes] {
            file.extend(word.to_le_bytes());
        }
    }
    (place, headers.len() as u16)
}

/// A list of entries, as `.eh_frame` or `.debug_frame` holds it.
pub(crate) struct Frames {
    bytes: Vec<u8>,
    cie: usize,
    debug: bool,
}

impl Frames {
    /// `.eh_frame`.
    pub(crate) fn eh() -> Self {
        Self { bytes: Vec::new(), cie: 0, debug: false }
    }

    /// `.debug_frame`.
    pub(crate) fn debug() -> Self {
        Self { bytes: Vec::new(), cie: 0, debug: true }
    }

    /// A CIE for the FDEs that follow: code alignment 1, data alignment -8.
    pub(crate) fn cie(mut self, augmentation: &str, return_address: u8, instructions: &[u8]) -> Self {
        let id = if self.debug { u32::MAX } else { 0 };
        let mut body = id.to_le_bytes().to_vec();
        body.push(1);
        body.extend(augmentation.bytes().chain([0]));
        body.extend([1, 0x78, return_address]);
        if augmentation.starts_with('z') {
            // FDE pointers: absolute 8-byte addresses.
            body.extend([1, 0x04]);
        }
        body.extend(instructions);
        self.cie = self.bytes.len();
        self.entry(&body);
        self
    }

    /// The usual CIE of x86-64: CFA = rsp+8, return address at CFA-8.
    pub(crate) fn x86_64() -> Self {
        Self::eh().cie("zR", 16, &[0x0c, 7, 8, 0x90, 1])
    }

    pub(crate) fn fde(mut self, start: u64, bytes: u64, instructions: &[u8]) -> Self {
        let here = self.bytes.len() as u32 + 4;
        let cie = if self.debug { self.cie as u32 } else { here - self.cie as u32 };
        let mut body = cie.to_le_bytes().to_vec();
        body.extend(start.to_le_bytes());
        body.extend(bytes.to_le_bytes());
        if !self.debug {
            body.push(0);
        }
        body.extend(instructions);
        self.entry(&body);
        self
    }

    /// Bytes as they are.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self
    }

    fn entry(&mut self, body: &[u8]) {
        self.bytes.extend((body.len() as u32).to_le_bytes());
        self.bytes.extend(body);
    }

    /// The section, with its terminator.
    pub(crate) fn finish(self) -> Vec<u8> {
        let end: &[u8] = if self.debug { &[] } else { &[0; 4] };
        [&self.bytes, end].concat()
    }
}
