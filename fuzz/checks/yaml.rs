// What is done with YAML that somebody names. Shared by the fuzz target and the corpus test, by `include!`.

use kvferry_yaml::{Value, parse, parse_all, read, write};

/// Reads `bytes` as a configuration and as manifests: what is wrong is said with its place, what is read can be written and read again.
fn yaml(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Err(error) = parse(&text) {
        placed(&error.to_string());
    }
    let documents = match parse_all(&text) {
        Ok(documents) => documents,
        Err(error) => return placed(&error.to_string()),
    };
    for document in documents {
        let value = match read::<Value>(&document) {
            Ok(value) => value,
            Err(error) => {
                placed(&error.to_string());
                continue;
            }
        };
        let written = write(&value, &[]);
        let again = parse_all(&written).ok().and_then(|nodes| nodes.into_iter().next());
        let again = again.and_then(|node| read::<Value>(&node).ok());
        assert!(again.as_ref() == Some(&value) || value == Value::Null, "{value:?} became {again:?} by\n{written}");
    }
}

fn placed(error: &str) {
    let place = error.split(':').next().unwrap_or_default();
    assert!(place.parse::<usize>().is_ok() || error.starts_with("it has "), "no place: {error}");
}
