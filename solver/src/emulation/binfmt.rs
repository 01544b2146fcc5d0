//! `binfmt_misc`: how each architecture's programs begin, and the kernel's two text formats about it.

/// How much of a program's beginning tells its architecture.
const LENGTH: usize = 20;

/// An architecture that QEMU can emulate.
#[derive(Debug)]
pub(super) struct Architecture {
    /// Its name in Go's words.
    pub(super) name: &'static str,
    /// Its name in QEMU's.
    qemu: &'static str,
    /// 1 for 32 bits, 2 for 64.
    class: u8,
    /// 1 for little-endian, 2 for big-endian.
    order: u8,
    machine: u16,
    /// Which bits of bytes 4 to 8 matter, where compilers differ.
    ident_mask: [u8; 5],
    /// Which bits of the version and machine matter.
    machine_mask: [u8; 2],
}

/// Any operating system's ABI will do: compilers mark some Linux programs as GNU's.
const ANY_ABI: [u8; 5] = [0xff, 0xff, 0xff, 0x00, 0xff];
const ALL: [u8; 2] = [0xff, 0xff];

const fn little(name: &'static str, qemu: &'static str, class: u8, machine: u16) -> Architecture {
    Architecture { name, qemu, class, order: 1, machine, ident_mask: ANY_ABI, machine_mask: ALL }
}

const fn big(name: &'static str, qemu: &'static str, class: u8, machine: u16) -> Architecture {
    Architecture { name, qemu, class, order: 2, machine, ident_mask: ANY_ABI, machine_mask: ALL }
}

/// The architectures that images are made for.
pub(super) const ARCHITECTURES: &[Architecture] = &[
    // Some tools mark their programs in the padding of these two.
    Architecture {
        ident_mask: [0xff, 0xfe, 0xfe, 0x00, 0xff],
        ..little("amd64", "x86_64", 2, 0x3e)
    },
    Architecture { ident_mask: [0xff, 0xfe, 0xfe, 0x00, 0xff], ..little("386", "i386", 1, 3) },
    little("arm64", "aarch64", 2, 0xb7),
    little("arm", "arm", 1, 0x28),
    little("riscv64", "riscv64", 2, 0xf3),
    Architecture { machine_mask: [0xff, 0x00], ..little("ppc64le", "ppc64le", 2, 0x15) },
    big("s390x", "s390x", 2, 0x16),
    little("loong64", "loongarch64", 2, 0x102),
    little("mips64le", "mips64el", 2, 8),
    big("mips64", "mips64", 2, 8),
];

impl Architecture {
    /// Returns the names that distributions give the static emulator, the likeliest first.
    pub(super) fn programs(&self) -> Vec<String> {
        vec![format!("qemu-{}-static", self.qemu), format!("qemu-{}", self.qemu)]
    }

    fn magic(&self) -> [u8; LENGTH] {
        let mut magic = [0; LENGTH];
        magic[..4].copy_from_slice(b"\x7fELF");
        magic[4..7].copy_from_slice(&[self.class, self.order, 1]);
        // An executable; the mask lets a shared object, its type plus one, pass as well.
        let (kind, machine) = match self.order {
            1 => (2_u16.to_le_bytes(), self.machine.to_le_bytes()),
            _ => (2_u16.to_be_bytes(), self.machine.to_be_bytes()),
        };
        magic[16..18].copy_from_slice(&kind);
        magic[18..].copy_from_slice(&machine);
        magic
    }

    fn mask(&self) -> [u8; LENGTH] {
        let mut mask = [0xff; LENGTH];
        mask[4..9].copy_from_slice(&self.ident_mask);
        let low_byte = if self.order == 1 { 16 } else { 17 };
        mask[low_byte] = 0xfe;
        mask[18..].copy_from_slice(&self.machine_mask);
        mask
    }

    /// Returns the line that registers an emulator: opened now (`F`), so that no image needs to hold it, and with the
    /// program's own set-user-id rights (`C`), so that `sudo` works.
    pub(super) fn register_line(&self, interpreter: &str, keeps_first_argument: bool) -> Vec<u8> {
        // The first byte sets the separator; this one is in no path worth naming.
        const SEPARATOR: char = '\u{1}';
        let hex = |bytes: [u8; LENGTH]| bytes.map(|byte| format!("\\x{byte:02x}")).concat();
        let flags = if keeps_first_argument { "PCF" } else { "CF" };
        let fields = [
            String::new(),
            format!("slipway-{}", self.name),
            "M".into(),
            "0".into(),
            hex(self.magic()),
            hex(self.mask()),
            interpreter.into(),
            flags.into(),
        ];
        fields.join(&SEPARATOR.to_string()).into_bytes()
    }
}

/// An entry of the host's table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HostEntry {
    offset: usize,
    magic: Vec<u8>,
    mask: Vec<u8>,
}

impl HostEntry {
    /// Reads what the kernel shows; `None` for an entry that does not help inside a root file system.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        if lines.next()? != "enabled" {
            return None;
        }
        let (mut fixed, mut offset, mut magic, mut mask) = (false, 0, None, None);
        for line in lines {
            let (key, value) = line.split_once(' ').unwrap_or((line, ""));
            match key {
                // Without F the kernel would look for the interpreter inside the image.
                "flags:" => fixed = value.contains('F'),
                "offset" => offset = value.trim().parse().ok()?,
                "magic" => magic = Some(unhex(value)?),
                "mask" => mask = Some(unhex(value)?),
                _ => {}
            }
        }
        let magic = magic.filter(|_| fixed)?;
        let mask = mask.unwrap_or_else(|| vec![0xff; magic.len()]);
        (mask.len() == magic.len()).then_some(Self { offset, magic, mask })
    }

    /// Returns whether the kernel would take a plain program of this architecture for this entry's.
    pub(super) fn runs(&self, architecture: &Architecture) -> bool {
        let program = architecture.magic();
        let Some(head) = program.get(self.offset..).filter(|head| head.len() >= self.magic.len())
        else {
            return false;
        };
        head.iter()
            .zip(&self.magic)
            .zip(&self.mask)
            .all(|((byte, magic), mask)| (byte ^ magic) & mask == 0)
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let text = text.trim().as_bytes();
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn architecture(name: &str) -> &'static Architecture {
        ARCHITECTURES.iter().find(|a| a.name == name).unwrap()
    }

    #[test]
    fn a_line_is_what_the_kernel_parses() {
        let line = architecture("arm64").register_line("/usr/bin/qemu-aarch64-static", true);
        let line = String::from_utf8(line).unwrap().replace('\u{1}', ":");
        assert_eq!(
            line,
            ":slipway-arm64:M:0\
             :\\x7f\\x45\\x4c\\x46\\x02\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\xb7\\x00\
             :\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff\
             :/usr/bin/qemu-aarch64-static:PCF"
        );
    }

    #[test]
    fn big_endian_programs_have_their_bytes_the_other_way_round() {
        let s390x = architecture("s390x");
        assert_eq!(s390x.magic()[16..], [0, 2, 0, 0x16]);
        assert_eq!(s390x.mask()[16..], [0xff, 0xfe, 0xff, 0xff]);
        assert_eq!(architecture("loong64").magic()[18..], [2, 1]);
    }

    #[test]
    fn no_architecture_is_taken_for_another() {
        for a in ARCHITECTURES {
            let entry = HostEntry { offset: 0, magic: a.magic().into(), mask: a.mask().into() };
            for b in ARCHITECTURES {
                assert_eq!(entry.runs(b), a.name == b.name, "{} {}", a.name, b.name);
            }
        }
    }

    #[test]
    fn the_hosts_entries_count_only_when_they_work_inside_a_root() {
        let text = |state: &str, flags: &str| {
            format!(
                "{state}\ninterpreter /usr/bin/qemu-aarch64-static\nflags: {flags}\noffset 0\n\
                 magic 7f454c460201010000000000000000000200b700\nmask ffffffffffffff00fffffffffffffffffeffffff\n"
            )
        };
        let entry = HostEntry::parse(&text("enabled", "OCF")).unwrap();
        assert!(entry.runs(architecture("arm64")) && !entry.runs(architecture("riscv64")));
        assert_eq!(HostEntry::parse(&text("disabled", "OCF")), None);
        assert_eq!(HostEntry::parse(&text("enabled", "OC")), None);
        assert_eq!(HostEntry::parse("enabled\ninterpreter /x\nflags: F\nextension .py\n"), None);
    }
}
