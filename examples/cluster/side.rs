//! One side of the cluster as `--prefill` or `--decode` describes it.

use std::sync::Arc;

use kvferry::{Format, GroupGeometry, KvPlacement, Model, Order, Parallel, PlanePlacement, Role};

use crate::error::UsageError;

const KEYS: &str = "tp, pp, layers, cp, adp, groups, nodes, block, order, kv, planes, blocks";
const COUNT: &str = "a number from 1 to 1048576";
/// Above everything that fits a machine, below everything that overflows.
const COUNT_MAX: u32 = 1 << 20;

/// The groups of one side, all alike.
#[derive(Clone, Debug)]
pub(crate) struct Side {
    pub(crate) role: Role,
    /// The option's value, for messages.
    pub(crate) value: String,
    pub(crate) geometry: Arc<GroupGeometry>,
    pub(crate) groups: u32,
    /// Simulated hosts of each group.
    pub(crate) nodes: u32,
    /// Blocks per layer group that were asked for.
    pub(crate) blocks: Option<u32>,
}

impl Side {
    /// Reads a side; `kv` and `planes` are what the model's description said.
    pub(crate) fn parse(
        role: Role,
        value: &str,
        model: &Model,
        kv: KvPlacement,
        planes: PlanePlacement,
    ) -> Result<Side, UsageError> {
        let reader = Reader { role, value };
        let mut keys: Vec<(&str, &str)> = Vec::new();
        for part in value.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let Some((key, given)) = part.split_once('=') else {
                return Err(UsageError::SidePart { side: role, value: value.to_owned(), part: part.to_owned() });
            };
            let (key, given) = (key.trim(), given.trim());
            if keys.iter().any(|(known, _)| *known == key) {
                return Err(UsageError::SideTwice { side: role, value: value.to_owned(), key: key.to_owned() });
            }
            keys.push((key, given));
        }
        let mut parallel = Parallel::default();
        let mut format = Format { kv, planes, ..Format::default() };
        let (mut groups, mut nodes, mut blocks) = (1, 1, None);
        let (mut pp, mut stages) = (None, None);
        for (key, given) in keys {
            match key {
                "tp" => parallel.tp = reader.count("tp", given)?,
                "pp" => pp = Some(reader.count("pp", given)?),
                "layers" => stages = Some(given),
                "cp" => parallel.cp = reader.count("cp", given)?,
                "adp" => parallel.adp = reader.count("adp", given)?,
                "groups" => groups = reader.count("groups", given)?,
                "nodes" => nodes = reader.count("nodes", given)?,
                "block" => format.block_tokens = reader.count("block", given)?,
                "blocks" => blocks = Some(reader.count("blocks", given)?),
                "order" => {
                    format.order =
                        reader.choice("order", given, "NHD or HND", [("NHD", Order::Nhd), ("HND", Order::Hnd)])?
                }
                "kv" => {
                    let choices = [("separate", KvPlacement::Separate), ("interleaved", KvPlacement::Interleaved)];
                    format.kv = reader.choice("kv", given, "separate or interleaved", choices)?;
                }
                "planes" => {
                    let choices = [("one", PlanePlacement::One), ("per-layer", PlanePlacement::PerLayer)];
                    format.planes = reader.choice("planes", given, "one or per-layer", choices)?;
                }
                _ => {
                    return Err(UsageError::SideKey {
                        side: role,
                        value: value.to_owned(),
                        key: key.to_owned(),
                        known: KEYS,
                    });
                }
            }
        }
        if let Some(given) = stages {
            parallel.stages = reader.stages(given, pp, model.layers)?;
            parallel.pp = parallel.stages.len() as u32;
        } else {
            parallel.pp = pp.unwrap_or(1);
        }
        let geometry = GroupGeometry { model: model.clone(), format, parallel };
        geometry.validate().map_err(|source| UsageError::Shape { side: role, value: value.to_owned(), source })?;
        if nodes > geometry.ranks() {
            return Err(UsageError::Nodes { side: role, value: value.to_owned(), nodes, ranks: geometry.ranks() });
        }
        Ok(Side { role, value: value.to_owned(), geometry: Arc::new(geometry), groups, nodes, blocks })
    }

    /// Ranks of all groups.
    pub(crate) fn ranks(&self) -> u64 {
        u64::from(self.groups) * u64::from(self.geometry.ranks())
    }
}

struct Reader<'a> {
    role: Role,
    value: &'a str,
}

impl Reader<'_> {
    fn count(&self, key: &'static str, given: &str) -> Result<u32, UsageError> {
        match given.parse() {
            Ok(count) if (1..=COUNT_MAX).contains(&count) => Ok(count),
            _ => Err(self.refuse(key, given, COUNT)),
        }
    }

    fn choice<T>(
        &self,
        key: &'static str,
        given: &str,
        allowed: &'static str,
        choices: [(&str, T); 2],
    ) -> Result<T, UsageError> {
        let found = choices.into_iter().find(|(name, _)| name.eq_ignore_ascii_case(given));
        found.map(|(_, choice)| choice).ok_or_else(|| self.refuse(key, given, allowed))
    }

    fn stages(&self, given: &str, pp: Option<u32>, layers: u32) -> Result<Vec<Vec<core::ops::Range<u32>>>, UsageError> {
        let (side, value) = (self.role, self.value.to_owned());
        let counts = given.split('+').map(|count| self.count("layers", count.trim()));
        let counts = counts
            .collect::<Result<Vec<u32>, _>>()
            .map_err(|_| self.refuse("layers", given, "numbers from 1, such as 3+2"))?;
        if let Some(pp) = pp.filter(|pp| counts.len() != *pp as usize) {
            return Err(UsageError::StageCount { side, value, given: given.to_owned(), stages: counts.len(), pp });
        }
        let sum = counts.iter().map(|count| u64::from(*count)).sum();
        if sum != u64::from(layers) {
            return Err(UsageError::StageSum { side, value, given: given.to_owned(), sum, layers });
        }
        let mut next = 0;
        let mut stages = Vec::with_capacity(counts.len());
        for count in counts {
            stages.push(vec![core::ops::Range { start: next, end: next + count }]);
            next += count;
        }
        Ok(stages)
    }

    fn refuse(&self, key: &'static str, given: &str, allowed: &'static str) -> UsageError {
        UsageError::SideValue { side: self.role, value: self.value.to_owned(), key, given: given.to_owned(), allowed }
    }
}
