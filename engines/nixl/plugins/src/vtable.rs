//! Which releases of NIXL have which vtable, and what a difference means.

use crate::elf::Vtable;

/// What a size says of the releases, from the wheels on PyPI up to 1.5.1.
const RELEASES: [(u64, &str); 4] =
    [(216, "0.3.1 to 0.4.1"), (240, "0.6.1 to 0.9.0"), (264, "0.10.1"), (232, "1.0.1 to 1.5.1")];

/// Releases that have a vtable of that size, where it is known.
pub(crate) fn releases(bytes: u64) -> Option<&'static str> {
    RELEASES.iter().find(|(size, _)| *size == bytes).map(|(_, releases)| *releases)
}

/// What happens when a core with `core`'s vtable calls a plugin with `plugin`'s; `None` when it is what was meant.
pub(crate) fn difference(core: &Vtable, plugin: &Vtable) -> Option<String> {
    let pairs = core.slots.iter().zip(&plugin.slots).enumerate();
    let differs = pairs.filter_map(|(slot, pair)| match pair {
        (Some(meant), Some(found)) if meant != found => Some((slot, meant, found)),
        _ => None,
    });
    let first = differs.min_by_key(|(slot, ..)| *slot);
    let of = |table: &Vtable| match releases(table.bytes) {
        Some(releases) => format!("{} virtual functions (NIXL {releases})", table.slots.len()),
        None => format!("{} virtual functions", table.slots.len()),
    };
    match first {
        Some((slot, meant, found)) => Some(format!(
            "the core has {}, the plugin {}; slot {slot} is `{}` to the core and `{}` in the plugin: the core calls another function than it means",
            of(core),
            of(plugin),
            readable(meant),
            readable(found)
        )),
        None if core.bytes != plugin.bytes => Some(format!(
            "the core has {}, the plugin {}: the core calls functions that the plugin does not have",
            of(core),
            of(plugin)
        )),
        None => None,
    }
}

/// The function's name out of a mangled `nixlBackendEngine::name(…)`, with the mangled arguments.
fn readable(mangled: &str) -> String {
    let rest =
        mangled.strip_prefix("_ZNK17nixlBackendEngine").or_else(|| mangled.strip_prefix("_ZN17nixlBackendEngine"));
    let Some(rest) = rest else { return mangled.to_owned() };
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let length = rest.get(..digits).and_then(|digits| digits.parse::<usize>().ok());
    let name = length.and_then(|length| rest.get(digits..digits.checked_add(length)?));
    name.map_or_else(|| mangled.to_owned(), str::to_owned)
}
