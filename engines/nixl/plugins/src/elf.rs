//! What of an ELF file decides whether the loader takes it: needs, symbols, versions, and one vtable.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use object::Endianness;
use object::elf::{self, FileHeader64, SectionHeader64, Sym64};
use object::read::elf::{Dyn, FileHeader, Rela, SectionHeader, Sym, SymbolTable, VersionTable};
use object::read::{ReadCache, ReadRef, SymbolIndex};
use thiserror::Error;

/// The class whose virtual functions are NIXL's plugin interface.
const ENGINE_VTABLE: &[u8] = b"_ZTV17nixlBackendEngine";
/// Bytes of one table that are read; the largest real ones have some megabytes.
const TABLE_BYTES_MAX: u64 = 256 << 20;
/// Symbols of one library.
const SYMBOLS_MAX: usize = 4 << 20;
/// Bytes of all names together: names may overlap in a hostile file, so that few bytes stand for many.
const NAMES_BYTES_MAX: usize = 256 << 20;
/// Versions that a library needs or defines: their indices have 15 bits. Damaged entries may point at themselves.
const VERSIONS_MAX: usize = 1 << 15;
/// Bytes of the vtable; the real one has about 250.
const VTABLE_BYTES_MAX: u64 = 1 << 16;
const WORD_BYTES: u64 = 8;

/// Why a file says nothing about itself.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ElfError {
    /// It cannot be read.
    #[error("it cannot be read: {reason}; name a readable library")]
    Unreadable {
        /// What the system says.
        reason: String,
    },
    /// No 64-bit ELF file, or a broken one.
    #[error("byte {at:#x}: {part}: {reason}; the file is cut, damaged or no 64-bit ELF library: fetch it again")]
    Malformed {
        /// Which part.
        part: &'static str,
        /// Where that part begins in the file.
        at: u64,
        /// What is wrong.
        reason: String,
    },
    /// A part that is larger than any real one.
    #[error("byte {at:#x}: {part} claims {claimed}, at most {limit} are read; no library has as many: fetch it again")]
    TooLarge {
        /// Which part.
        part: &'static str,
        /// Where it begins in the file.
        at: u64,
        /// What it claims.
        claimed: u64,
        /// What is read.
        limit: u64,
    },
}

/// A symbol that somebody else must define.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undefined {
    /// Its name, mangled.
    pub name: String,
    /// The version that it must have.
    pub version: Option<String>,
}

/// The vtable of the class through which NIXL calls a plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vtable {
    /// Its size.
    pub bytes: u64,
    /// The virtual functions in order, mangled; `None` where the file does not name it.
    pub slots: Vec<Option<String>>,
}

/// A library, as the loader sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Elf {
    /// ELF's number of the processor.
    pub machine: u16,
    /// Its own name.
    pub soname: Option<String>,
    /// Names of the libraries that it needs, in order.
    pub needed: Vec<String>,
    /// Folders that are searched before `LD_LIBRARY_PATH`, unless there is a run path.
    pub rpath: Vec<String>,
    /// Folders that are searched after it.
    pub runpath: Vec<String>,
    /// What it defines for others, each with its versions; none where it has no versions.
    pub defined: BTreeMap<String, Vec<String>>,
    /// What it cannot do without.
    pub undefined: Vec<Undefined>,
    /// Versions that it defines.
    pub versions: BTreeSet<String>,
    /// Versions that it needs, with the library that must define them.
    pub versions_needed: Vec<(String, String)>,
    /// The vtable of `nixlBackendEngine`, if it has one.
    pub vtable: Option<Vtable>,
}

impl Elf {
    /// Reads a file, and of it only the tables that matter.
    pub fn read(path: &Path) -> Result<Elf, ElfError> {
        let unreadable = |error: std::io::Error| ElfError::Unreadable { reason: error.to_string() };
        // Before it is opened: opening a pipe waits for whoever writes it.
        if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
            return Err(ElfError::Unreadable { reason: "it is no file".to_owned() });
        }
        Elf::parse(&ReadCache::new(File::open(path).map_err(unreadable)?))
    }

    /// Reads bytes.
    pub fn parse<'data, R: ReadRef<'data>>(data: R) -> Result<Elf, ElfError> {
        Parts::new(data)?.elf()
    }
}

type Header = FileHeader64<Endianness>;
type Section = SectionHeader64<Endianness>;

/// A file's tables.
struct Parts<'data, R: ReadRef<'data>> {
    data: R,
    endian: Endianness,
    machine: u16,
    sections: &'data [Section],
}

impl<'data, R: ReadRef<'data>> Parts<'data, R> {
    fn new(data: R) -> Result<Self, ElfError> {
        let header = Header::parse(data).map_err(|error| malformed("the file header", 0, error))?;
        let endian = header.endian().map_err(|error| malformed("the file header", 0, error))?;
        let at = header.e_shoff(endian);
        let sections =
            header.section_headers(endian, data).map_err(|error| malformed("the section table", at, error))?;
        if sections.is_empty() {
            return Err(malformed("the section table", at, "it is empty"));
        }
        Ok(Parts { data, endian, machine: header.e_machine(endian).0, sections })
    }

    /// The first section of a kind, unless it is larger than any real one.
    fn section(&self, kind: elf::SectionType, part: &'static str) -> Result<Option<(usize, &'data Section)>, ElfError> {
        let found = self.sections.iter().enumerate().find(|(_, section)| section.sh_type(self.endian) == kind);
        found.map(|(index, section)| self.bounded(section, part).map(|()| (index, section))).transpose()
    }

    fn bounded(&self, section: &Section, part: &'static str) -> Result<(), ElfError> {
        let (at, claimed) = (section.sh_offset(self.endian), section.sh_size(self.endian));
        if claimed > TABLE_BYTES_MAX {
            return Err(ElfError::TooLarge { part, at, claimed, limit: TABLE_BYTES_MAX });
        }
        // Names are searched for their end: the table that they stand in is bounded, too.
        match self.sections.get(section.sh_link(self.endian) as usize) {
            Some(strings) if strings.sh_size(self.endian) > TABLE_BYTES_MAX => Err(ElfError::TooLarge {
                part: "the string table",
                at: strings.sh_offset(self.endian),
                claimed: strings.sh_size(self.endian),
                limit: TABLE_BYTES_MAX,
            }),
            _ => Ok(()),
        }
    }

    fn elf(&self) -> Result<Elf, ElfError> {
        let mut elf = Elf { machine: self.machine, ..Elf::default() };
        self.dynamic(&mut elf)?;
        self.symbols(&mut elf)?;
        Ok(elf)
    }

    fn dynamic(&self, elf: &mut Elf) -> Result<(), ElfError> {
        const PART: &str = "the dynamic section";
        let Some((_, section)) = self.section(elf::SHT_DYNAMIC, PART)? else {
            return Err(malformed(PART, 0, "there is none: it is no shared library"));
        };
        let at = section.sh_offset(self.endian);
        let wrong = |error| malformed(PART, at, error);
        let Some((entries, link)) = section.dynamic(self.endian, self.data).map_err(wrong)? else { return Ok(()) };
        let strings = self
            .sections
            .get(link.0)
            .ok_or_else(|| malformed(PART, at, "its string table is missing"))?
            .strings(self.endian, self.data)
            .map_err(wrong)?
            .unwrap_or_default();
        let mut names_bytes = 0;
        for entry in entries {
            let tag = entry.tag(self.endian);
            if tag == elf::DT_NULL {
                break;
            }
            if ![elf::DT_NEEDED, elf::DT_SONAME, elf::DT_RPATH, elf::DT_RUNPATH].contains(&tag) {
                continue;
            }
            let text = lossy(entry.string(self.endian, strings).map_err(wrong)?);
            spend(&mut names_bytes, text.len(), at)?;
            match tag {
                elf::DT_NEEDED => elf.needed.push(text),
                elf::DT_SONAME => elf.soname = Some(text),
                elf::DT_RPATH => elf.rpath = folders(&text),
                _ => elf.runpath = folders(&text),
            }
        }
        Ok(())
    }

    fn symbols(&self, elf: &mut Elf) -> Result<(), ElfError> {
        const PART: &str = "the symbol table";
        let Some((index, section)) = self.section(elf::SHT_DYNSYM, PART)? else {
            return Err(malformed(PART, 0, "there is none: it is no shared library"));
        };
        let at = section.sh_offset(self.endian);
        let wrong = |error| malformed(PART, at, error);
        let table = self.sections_table()?;
        let symbols =
            SymbolTable::parse(self.endian, self.data, &table, object::SectionIndex(index), section).map_err(wrong)?;
        if symbols.len() > SYMBOLS_MAX {
            return Err(ElfError::TooLarge {
                part: PART,
                at,
                claimed: symbols.len() as u64,
                limit: SYMBOLS_MAX as u64,
            });
        }
        let versions = self.versions(&table, elf)?;
        let mut names_bytes = 0;
        let mut vtable = None;
        let mut functions: BTreeMap<u64, String> = BTreeMap::new();
        for (index, symbol) in symbols.enumerate().skip(1) {
            if symbol.st_bind() == elf::STB_LOCAL {
                continue;
            }
            let name = symbol.name(self.endian, symbols.strings()).map_err(wrong)?;
            spend(&mut names_bytes, name.len(), at)?;
            if name.is_empty() {
                continue;
            }
            let version = version_of(&versions, self.endian, index);
            spend(&mut names_bytes, version.as_ref().map_or(0, String::len), at)?;
            if symbol.st_shndx(self.endian) == elf::SHN_UNDEF {
                if symbol.st_bind() != elf::STB_WEAK {
                    elf.undefined.push(Undefined { name: lossy(name), version });
                }
                continue;
            }
            if name == ENGINE_VTABLE {
                vtable = Some(symbol);
            }
            functions.insert(symbol.st_value(self.endian), lossy(name));
            elf.defined.entry(lossy(name)).or_default().extend(version);
        }
        elf.vtable = vtable.map(|symbol| self.vtable(symbol, &symbols, &functions)).transpose()?;
        Ok(())
    }

    fn sections_table(&self) -> Result<object::read::elf::SectionTable<'data, Header, R>, ElfError> {
        Ok(object::read::elf::SectionTable::new(self.sections, object::StringTable::default()))
    }

    fn versions(
        &self,
        table: &object::read::elf::SectionTable<'data, Header, R>,
        elf: &mut Elf,
    ) -> Result<VersionTable<'data, Header>, ElfError> {
        const PART: &str = "the version tables";
        for kind in [elf::SHT_GNU_VERSYM, elf::SHT_GNU_VERDEF, elf::SHT_GNU_VERNEED] {
            self.section(kind, PART)?;
        }
        let place = |kind| self.sections.iter().find(|section| section.sh_type(self.endian) == kind);
        let at = |kind| place(kind).map_or(0, |section| section.sh_offset(self.endian));
        let defined_at = at(elf::SHT_GNU_VERDEF);
        let needed_at = at(elf::SHT_GNU_VERNEED);
        let (mut names_bytes, mut versions) = (0, 0);
        if let Some((mut needs, link)) =
            table.gnu_verneed(self.endian, self.data).map_err(|error| malformed(PART, needed_at, error))?
        {
            let wrong = |error| malformed(PART, needed_at, error);
            let strings = table.strings(self.endian, self.data, link).map_err(wrong)?;
            while let Some((need, mut names)) = needs.next().map_err(wrong)? {
                let file = need.file(self.endian, strings).map_err(wrong)?;
                while let Some(name) = names.next().map_err(wrong)? {
                    // A weak need is none.
                    let weak = name.vna_flags.get(self.endian).0 & elf::VER_FLG_WEAK.0 != 0;
                    let version = name.name(self.endian, strings).map_err(wrong)?;
                    spend(&mut names_bytes, file.len() + version.len(), needed_at)?;
                    count(&mut versions, needed_at)?;
                    if !weak {
                        elf.versions_needed.push((lossy(file), lossy(version)));
                    }
                }
            }
        }
        if let Some((mut definitions, link)) =
            table.gnu_verdef(self.endian, self.data).map_err(|error| malformed(PART, defined_at, error))?
        {
            let wrong = |error| malformed(PART, defined_at, error);
            let strings = table.strings(self.endian, self.data, link).map_err(wrong)?;
            while let Some((_, mut names)) = definitions.next().map_err(wrong)? {
                // The first is its name, those after it are what it inherits from.
                if let Some(name) = names.next().map_err(wrong)? {
                    let version = name.name(self.endian, strings).map_err(wrong)?;
                    spend(&mut names_bytes, version.len(), defined_at)?;
                    count(&mut versions, defined_at)?;
                    elf.versions.insert(lossy(version));
                }
            }
        }
        let table = table.versions(self.endian, self.data).map_err(|error| malformed(PART, defined_at, error))?;
        Ok(table.unwrap_or_default())
    }

    /// The slots, from the relocations that fill them.
    fn vtable(
        &self,
        symbol: &Sym64<Endianness>,
        symbols: &SymbolTable<'data, Header, R>,
        functions: &BTreeMap<u64, String>,
    ) -> Result<Vtable, ElfError> {
        let (address, bytes) = (symbol.st_value(self.endian), symbol.st_size(self.endian));
        if bytes > VTABLE_BYTES_MAX {
            let part = "the vtable of nixlBackendEngine";
            return Err(ElfError::TooLarge { part, at: address, claimed: bytes, limit: VTABLE_BYTES_MAX });
        }
        // Two words precede the functions: the offset to the top, and the type.
        let count = (bytes / WORD_BYTES).saturating_sub(2) as usize;
        let mut slots = vec![None; count];
        for section in self.sections.iter().filter(|section| section.sh_type(self.endian) == elf::SHT_RELA) {
            const PART: &str = "a relocation table";
            self.bounded(section, PART)?;
            let at = section.sh_offset(self.endian);
            let Some((relocations, _)) =
                section.rela(self.endian, self.data).map_err(|error| malformed(PART, at, error))?
            else {
                continue;
            };
            for relocation in relocations {
                let place = relocation.r_offset(self.endian).wrapping_sub(address);
                let slot = (place / WORD_BYTES).checked_sub(2).and_then(|slot| slots.get_mut(slot as usize));
                let Some(slot) = slot.filter(|slot| slot.is_none() && place % WORD_BYTES == 0) else { continue };
                let index = relocation.symbol(self.endian, false);
                *slot = match index {
                    Some(index) => {
                        let named = symbols.symbol(index).map_err(|error| malformed(PART, at, error))?;
                        let name = named.name(self.endian, symbols.strings());
                        Some(lossy(name.map_err(|error| malformed(PART, at, error))?))
                    }
                    None => functions.get(&(relocation.r_addend(self.endian) as u64)).cloned(),
                };
            }
        }
        Ok(Vtable { bytes, slots })
    }
}

/// The version of a symbol, unless it has none or only the library's own.
fn version_of(versions: &VersionTable<'_, Header>, endian: Endianness, index: SymbolIndex) -> Option<String> {
    let index = versions.version_index(endian, index);
    versions.version(index.index()).ok().flatten().map(|version| lossy(version.name()))
}

fn spend(spent: &mut usize, bytes: usize, at: u64) -> Result<(), ElfError> {
    *spent = spent.saturating_add(bytes);
    if *spent > NAMES_BYTES_MAX {
        let part = "the names of symbols";
        return Err(ElfError::TooLarge { part, at, claimed: *spent as u64, limit: NAMES_BYTES_MAX as u64 });
    }
    Ok(())
}

fn count(versions: &mut usize, at: u64) -> Result<(), ElfError> {
    *versions += 1;
    if *versions > VERSIONS_MAX {
        let part = "the version tables";
        return Err(ElfError::TooLarge { part, at, claimed: *versions as u64, limit: VERSIONS_MAX as u64 });
    }
    Ok(())
}

fn folders(list: &str) -> Vec<String> {
    list.split(':').filter(|folder| !folder.is_empty()).map(str::to_owned).collect()
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn malformed(part: &'static str, at: u64, reason: impl ToString) -> ElfError {
    ElfError::Malformed { part, at, reason: reason.to_string() }
}
