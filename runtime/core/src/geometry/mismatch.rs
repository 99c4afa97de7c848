//! Whether two models' KV is the same, field by field.

use core::fmt;

use super::Model;

/// Two models whose KV differs. Shard, block size, order and planes are no part of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ModelMismatch {
    /// Every field that differs.
    pub fields: Vec<FieldMismatch>,
}

/// One field that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldMismatch {
    /// Where it is: `groups[0].dtype`.
    pub path: String,
    /// Its value in this model.
    pub here: String,
    /// Its value in the other.
    pub there: String,
}

impl fmt::Display for ModelMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the models' KV differs: ")?;
        for (index, field) in self.fields.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{field}")?;
        }
        f.write_str(": serve the same model with the same KV dtype on both sides")
    }
}

impl fmt::Display for FieldMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} here, {} there", self.path, self.here, self.there)
    }
}

impl Model {
    /// An error that lists every field in which `other`'s KV differs. Names of models and of layer groups may differ, and so may the
    /// rule by which heads are divided.
    pub fn mismatch(&self, other: &Model) -> Result<(), ModelMismatch> {
        let mut fields = Vec::new();
        let mut differ = |path: String, here: &dyn fmt::Display, there: &dyn fmt::Display| {
            let (here, there) = (here.to_string(), there.to_string());
            if here != there {
                fields.push(FieldMismatch { path, here, there });
            }
        };
        differ("layers".to_owned(), &self.layers, &other.layers);
        differ("groups".to_owned(), &self.groups.len(), &other.groups.len());
        for (index, (here, there)) in self.groups.iter().zip(&other.groups).enumerate() {
            let path = |field: &str| format!("groups[{index}].{field}");
            if here.layers != there.layers {
                differ(path("layers"), &Layers(&here.layers), &Layers(&there.layers));
            }
            differ(path("dtype"), &here.dtype, &there.dtype);
            differ(path("extent"), &format_args!("{:?}", here.extent), &format_args!("{:?}", there.extent));
            differ(path("tensors"), &here.tensors.len(), &there.tensors.len());
            for (number, (here, there)) in here.tensors.iter().zip(&there.tensors).enumerate() {
                let path = |field: &str| path(&format!("tensors[{number}].{field}"));
                differ(path("name"), &here.name, &there.name);
                differ(path("heads"), &here.heads, &there.heads);
                differ(path("elements"), &here.elements, &there.elements);
            }
        }
        if fields.is_empty() { Ok(()) } else { Err(ModelMismatch { fields }) }
    }
}

/// Layer numbers as ranges: `0-3+5`.
struct Layers<'a>(&'a [u32]);

impl fmt::Display for Layers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for layer in self.0 {
            match runs.last_mut() {
                Some((_, last)) if last.checked_add(1) == Some(*layer) => *last = *layer,
                _ => runs.push((*layer, *layer)),
            }
        }
        for (index, (first, last)) in runs.iter().enumerate() {
            let plus = if index == 0 { "" } else { "+" };
            if first == last { write!(f, "{plus}{first}")? } else { write!(f, "{plus}{first}-{last}")? }
        }
        Ok(())
    }
}
