//! The fuzz target over its corpus, and over what only just is YAML.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "this is test code"
)]

use kvferry_yaml::{Comment, YamlError};
use proptest::prelude::*;

include!("../../../fuzz/checks/corpus.rs");
include!("../../../fuzz/checks/yaml.rs");

#[test]
fn the_corpus_is_survived() {
    survive("yaml", yaml);
}

/// Aliases that stand for more than memory holds, where a tree is walked without sharing.
#[test]
fn a_thousand_million_laughs_are_refused_with_their_place() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..10 {
        let last = format!("*a{}, ", level - 1).repeat(10);
        text.push_str(&format!("a{level}: &a{level} [{last}]\n"));
    }
    assert!(parse(&text).is_ok(), "shared, it costs what its text costs");
    assert!(matches!(parse_all(&text), Err(YamlError::TooMany { .. })));
    let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(500_000), "*a, ".repeat(50));
    assert!(matches!(parse_all(&long), Err(YamlError::Repeated { .. })));
}

#[test]
fn values_are_written_as_they_are_read_with_comments_where_they_belong() {
    let text = "kind: Service\nspec:\n  ports:\n  - name: http\n    port: 80\n  - port: 81\n  empty: {}\n  text: \"1\"\n  word: \"yes\"\n";
    let document = parse_all(text).unwrap().remove(0);
    let value: Value = read(&document).unwrap();
    let comment = |path: &str| Comment { path: path.to_owned(), text: format!("about {path}") };
    let written = write(&value, &[comment("/spec/ports/1"), comment(""), comment("/spec/text")]);
    let commented = "# about\n".to_owned()
        + &text
            .replace("  ports:\n  - name", "  ports:\n    - name")
            .replace("    port: 80", "      port: 80")
            .replace("  - port: 81", "    # about /spec/ports/1\n    - port: 81")
            .replace("  text:", "  # about /spec/text\n  text:");
    assert_eq!(written, commented);
    assert_eq!(read::<Value>(&parse_all(&written).unwrap()[0]).unwrap(), value);
}

/// Found by fuzzing: what stands before a colon is a key of at most 1,024 characters, escapes counted.
#[test]
fn keys_that_are_too_long_for_a_line_are_read_again() {
    for key in ["\u{e}".repeat(121), "k".repeat(5000), "'".repeat(1001), "k\n".repeat(900)] {
        let of = |value: Value| Value::Map(vec![(key.clone(), value.clone()), ("b".to_owned(), value)]);
        let leaf = of(Value::from("word"));
        let list = Value::List(vec![leaf.clone(), Value::List(vec![leaf.clone()]), Value::Null]);
        for value in [of(Value::Null), of(leaf), of(list.clone()), of(of(list))] {
            let written = write(&value, &[]);
            let again = parse_all(&written).map(|nodes| read::<Value>(&nodes[0]).unwrap());
            assert_eq!(again.unwrap(), value, "by\n{written}");
        }
    }
}

#[test]
fn an_editors_mark_of_utf_8_is_no_part_of_the_first_key() {
    let text = "a: 1\n---\nb: 2\n";
    let read =
        |text: &str| parse_all(text).unwrap().iter().map(|node| read::<Value>(node).unwrap()).collect::<Vec<_>>();
    for marked in
        ["\u{feff}a: 1\n---\nb: 2\n", "\u{feff}\u{feff}a: 1\n---\n\u{feff}b: 2\n", "a: 1\n\u{feff}---\nb: 2\n"]
    {
        assert_eq!(read(marked), read(text), "{marked:?}");
    }
}

#[test]
fn a_wrong_type_is_said_with_its_place() {
    let document = parse_all("a: 1\nb:\n  - c: 2\n  - c: [x]\n").unwrap().remove(0);
    #[derive(serde::Deserialize, Debug)]
    struct Outer {
        #[expect(dead_code, reason = "only read")]
        b: Vec<std::collections::BTreeMap<String, i64>>,
    }
    let error = read::<Outer>(&document).unwrap_err();
    assert_eq!((error.at.line, error.at.column), (4, 8), "{error}");
}

proptest! {
    #[test]
    fn any_text_ends_in_a_tree_or_a_place(text in "[a-c:&*\\[\\]{},'\"|>#~\\- \n0-9?!%]{0,80}") {
        yaml(text.as_bytes());
    }

    #[test]
    fn any_word_is_written_so_that_it_is_read(word in "\\PC{0,20}", key in "[a-zA-Z0-9 :#./~-]{0,12}") {
        let value = Value::Map(vec![(key, Value::Text(word.clone())), ("list".to_owned(), Value::List(vec![Value::Text(word)]))]);
        let written = write(&value, &[]);
        let document = parse_all(&written).unwrap().remove(0);
        prop_assert_eq!(read::<Value>(&document).unwrap(), value, "by\n{}", written);
    }
}
