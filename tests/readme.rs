//! The README shows code and commands that exist.

const README: &str = include_str!("../README.md");

#[test]
fn the_snippet_is_the_example() {
    let example = include_str!("../examples/embed.rs").trim();
    assert!(README.contains(example), "README.md does not hold examples/embed.rs as it is");
    assert!(example.lines().count() <= 80, "examples/embed.rs has grown beyond 80 lines");
}

#[test]
fn linked_files_exist() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let links =
        README.split("](").skip(1).filter_map(|rest| rest.split(')').next()).filter(|link| !link.starts_with("http"));
    for link in links {
        assert!(root.join(link).exists(), "README.md links to {link}, which is not there");
    }
}
