//! What the loader would load with a library, and whether every symbol would be found. Nothing is loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use kvferry_doctor::{Environment, SysRoot, find_library};

use crate::elf::{Elf, ElfError, Undefined};

/// Libraries that one library brings with it; more is no library of anybody's.
const LIBRARIES_MAX: usize = 4096;

/// A library in a process.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) path: PathBuf,
    pub(crate) elf: Rc<Elf>,
    /// Who needed it, as an index into the same list.
    parent: Option<usize>,
}

impl Object {
    /// Whether somebody who needs `soname` gets this.
    fn answers_to(&self, soname: &str) -> bool {
        self.elf.soname.as_deref() == Some(soname) || self.path.file_name().is_some_and(|name| name == soname)
    }
}

/// What is wrong with a library's surroundings.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Gap {
    /// Nobody has the library.
    Library { soname: String, needed_by: String },
    /// It is found, and lacks a version.
    Version { library: String, version: String, needed_by: String },
    /// Nobody defines the symbol.
    Symbol { name: String, needed_by: String },
}

/// Finds libraries as the loader does, and remembers what it has read.
#[derive(Debug)]
pub(crate) struct Linker {
    root: SysRoot,
    environment: Environment,
    read: BTreeMap<PathBuf, Rc<Elf>>,
}

impl Linker {
    pub(crate) fn new(environment: Environment) -> Linker {
        Linker { root: SysRoot::live(), environment, read: BTreeMap::new() }
    }

    pub(crate) fn read(&mut self, path: &Path) -> Result<Rc<Elf>, ElfError> {
        let real = std::fs::canonicalize(path).map_err(|error| ElfError::Unreadable { reason: error.to_string() })?;
        if let Some(known) = self.read.get(&real) {
            return Ok(Rc::clone(known));
        }
        let elf = Rc::new(Elf::read(&real)?);
        self.read.insert(real, Rc::clone(&elf));
        Ok(elf)
    }

    /// The library and all that come with it, in the loader's order, where `present` are there already; and what is not found.
    pub(crate) fn load(&mut self, path: &Path, present: &[Object]) -> Result<(Vec<Object>, Vec<Gap>), ElfError> {
        let mut objects = vec![Object { path: path.to_owned(), elf: self.read(path)?, parent: None }];
        let mut gaps = BTreeSet::new();
        let mut at = 0;
        while let Some(object) = objects.get(at).cloned() {
            // What is there already has what it needs.
            let is_present = present.iter().any(|other| other.path == object.path);
            for soname in &object.elf.needed {
                if objects.iter().any(|other| other.answers_to(soname)) || objects.len() >= LIBRARIES_MAX {
                    continue;
                }
                let known = present.iter().find(|other| other.answers_to(soname));
                let found = match known {
                    Some(known) => Some((known.path.clone(), Rc::clone(&known.elf))),
                    None => self.search(soname, at, &objects),
                };
                match found {
                    Some((path, elf)) => objects.push(Object { path, elf, parent: Some(at) }),
                    None if is_present => {}
                    None => {
                        gaps.insert(Gap::Library { soname: soname.clone(), needed_by: name(&object.path) });
                    }
                }
            }
            at += 1;
        }
        Ok((objects, gaps.into_iter().collect()))
    }

    /// The first file of that name for the same processor: the loader passes over others.
    fn search(&mut self, soname: &str, by: usize, objects: &[Object]) -> Option<(PathBuf, Rc<Elf>)> {
        let needer = objects.get(by)?;
        let machine = needer.elf.machine;
        let mut candidates = Vec::new();
        if soname.contains('/') {
            candidates.push(PathBuf::from(soname));
        } else {
            let mut chain = Some(by);
            // Old run paths hold for all that a library brings, unless it has a new one.
            while let Some(object) = chain.filter(|_| needer.elf.runpath.is_empty()).and_then(|at| objects.get(at)) {
                if object.elf.runpath.is_empty() {
                    candidates.extend(places(&object.path, &object.elf.rpath, soname));
                }
                chain = object.parent;
            }
            let known = find_library(&self.root, &self.environment, soname, "");
            let (asked, usual): (Vec<_>, Vec<_>) =
                known.into_iter().partition(|found| found.by.starts_with("LD_LIBRARY_PATH"));
            candidates.extend(asked.into_iter().map(|found| found.path));
            candidates.extend(places(&needer.path, &needer.elf.runpath, soname));
            candidates.extend(usual.into_iter().map(|found| found.path));
        }
        candidates.into_iter().find_map(|path| {
            let elf = self.read(&path).ok().filter(|elf| elf.machine == machine)?;
            Some((path, elf))
        })
    }
}

/// What the newly loaded libraries ask for and nobody in `objects`, which see only each other, defines.
pub(crate) fn unresolved(objects: &[Object], present: &[Object]) -> Vec<Gap> {
    let mut gaps = BTreeSet::new();
    for object in objects.iter().filter(|object| !present.iter().any(|other| other.path == object.path)) {
        let needed_by = name(&object.path);
        for (file, version) in &object.elf.versions_needed {
            let provider = objects.iter().find(|other| other.answers_to(file));
            // Without any versions everything matches.
            let lacks = |other: &&Object| !other.elf.versions.is_empty() && !other.elf.versions.contains(version);
            if let Some(provider) = provider.filter(lacks) {
                let (library, version) = (provider.path.display().to_string(), version.clone());
                gaps.insert(Gap::Version { library, version, needed_by: needed_by.clone() });
            }
        }
        for symbol in &object.elf.undefined {
            if !objects.iter().any(|other| defines(&other.elf, symbol)) {
                gaps.insert(Gap::Symbol { name: symbol.name.clone(), needed_by: needed_by.clone() });
            }
        }
    }
    gaps.into_iter().collect()
}

fn defines(elf: &Elf, symbol: &Undefined) -> bool {
    let Some(versions) = elf.defined.get(&symbol.name) else { return false };
    match &symbol.version {
        Some(version) => versions.is_empty() || versions.contains(version),
        None => true,
    }
}

fn places<'a>(library: &Path, folders: &'a [String], soname: &'a str) -> impl Iterator<Item = PathBuf> + use<'a> {
    let origin = library.parent().map(|folder| folder.display().to_string()).unwrap_or_default();
    folders
        .iter()
        .map(move |folder| PathBuf::from(folder.replace("${ORIGIN}", &origin).replace("$ORIGIN", &origin)).join(soname))
}

pub(crate) fn name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
