"""Topic records of the kitchen, the house and the garden, in the format of `topics`."""

HOME = """
bake bread | baking bread | a baker; a baking teacher
+ mix [strong|plain|wholemeal] flour with [warm|lukewarm] water, salt and [a little|a spoon of] yeast
+ knead the dough for [eight|ten|twelve] minutes until it feels [smooth|springy]
+ let the dough rise [in a warm place|under a cloth] [for an hour|until it doubles]
+ shape the loaf and score the top with a [sharp|wet] knife
+ bake the loaf in a hot oven for [thirty|thirty-five|forty] minutes
+ let the loaf cool on a rack before you [slice|cut] it
- mix flour, water and yeast
- knead the dough well
- let the dough rise
- bake it [hot|in a hot oven]
= [good bread|a good loaf] needs time more than strength
= steam in the oven gives the loaf a crisp crust
? the oven heat; the dough; the yeast
! a burnt crust; a raw middle; dry dough

brew tea | brewing tea | a tea seller; a tea taster
+ boil [fresh|cold] water and warm the pot [first|with a splash of it]
+ put one spoon of [black|green|loose] leaves in for each cup
+ pour the water over the leaves and cover the [pot|cup]
+ let the tea steep for [two|three|four] minutes
+ strain the leaves and add [milk|lemon|honey] if you like it
- boil fresh water
- steep it three minutes
- warm the pot
- strain the leaves
= green tea turns bitter in boiling water
= loose leaves give [more taste|a fuller taste] than bags
? the water heat; the steeping time; the leaves
! a bitter cup; a scalded hand; weak tea

make coffee | making coffee | a barista; a coffee roaster
+ grind [fresh|whole] beans just before you brew
+ use [two spoons|fifteen grams] of coffee for each cup
+ wet the grounds and wait [thirty|forty] seconds
+ pour hot water over the grounds in [slow|small] circles
+ rinse the filter with hot water [first|beforehand]
- grind fresh beans
- pour the water slowly
- rinse the filter
- use two spoons each
= fresh beans matter more than [the machine|a costly machine]
= a coarse grind suits a [press|long brew]
? the grind; the water heat; the filter
! a sour cup; bitter grounds; burnt fingers

cook rice | cooking rice | a cook; a rice farmer
+ rinse the rice in cold water until it runs [clear|clean]
+ add [two|nearly two] cups of water for each cup of rice
+ bring the pot to the boil, then turn the heat [low|right down]
+ cover the pot and cook it for [twelve|fifteen] minutes
+ let the rice rest [off the heat|under the lid], then fluff it with a fork
- rinse the rice
- cook it covered
- use a low heat
- let it rest
= steam does the last part of the cooking
= rinsing washes off the starch that makes rice [sticky|gluey]
? the water; the heat; the lid
! a burnt pot; sticky rice; hard grains

make soup | making soup | a cook; a chef
+ fry [onions|leeks] gently in [butter|oil] until they are soft
+ add [carrots, celery and potatoes|the vegetables in small cubes]
+ pour in [stock|broth] and simmer it for [twenty|thirty] minutes
+ blend half of the soup to make it [thick|creamy]
+ season it with [salt and pepper|herbs and lemon] at the end
- fry onions gently
- add stock and vegetables
- simmer it slowly
- season it last
= slow heat draws out [the flavour|more flavour]
= most soups taste better on the [second|next] day
? the salt; the heat; the stock
! a burnt base; too much salt; a boiled-over pot

boil eggs | boiling eggs | a cook; a breakfast chef
+ lower the eggs into [gently boiling|simmering] water with a spoon
+ boil them for [six minutes if you want them soft|nine minutes if you want them hard]
+ cool the eggs in [cold|iced] water at once
+ start with eggs that are [not too cold|at room heat]
+ peel the eggs under [running|cold] water
- boil them six minutes
- cool them in water
- lower them in gently
- peel under running water
= older eggs peel [more easily|better] than fresh ones
= a soft egg needs about six minutes
? the timer; the water; the shells
! cracked shells; a hot splash; runny whites

bake a cake | baking a cake | a pastry cook; a baker
+ beat [soft butter|the butter] with sugar until it is [pale|light]
+ add the eggs one [by one|at a time] and stir
+ fold in the flour with a [large spoon|light hand]
+ line the tin with paper and fill it [halfway|two thirds full]
+ bake the cake for [thirty|forty] minutes at a [medium|steady] heat
- beat butter and sugar
- fold in the flour
- line the tin
- bake it at medium heat
= an open oven door can make a cake [sink|fall]
= [eggs|butter and eggs] mix best when they are not cold
? the oven; the batter; the tin
! a sunken middle; a dry cake; burnt edges

grow tomatoes | growing tomatoes | a gardener; a nursery grower
+ sow the seeds indoors in [early|late] spring
+ plant the seedlings deep in [rich|loose] soil
+ tie the stems to a [cane|stake] as they grow
+ pinch out the side shoots [every week|once a week]
+ water the roots [in the morning|every other day], not the leaves
- sow seeds indoors
- plant them deep
- tie up the stems
- water the roots
= tomatoes want [six|seven] hours of sun a day
= wet leaves invite [mould|blight]
? the soil; the night frost; the leaves
! frost; blight; split fruit

keep house plants | keeping house plants | a gardener; a plant seller
+ put the plants near a [bright|clear] window, out of [hot|direct] sun
+ water them when the top of the soil feels [dry|light]
+ use pots with [holes|good drainage] and a saucer
+ feed them [once a month|every few weeks] in summer
+ wipe the dust off the leaves with a [damp|soft] cloth
- find a bright window
- water when soil dries
- feed them in summer
- wipe the leaves
= most house plants die of too much water
= plants rest in winter and drink [less|little]
? the soil; the roots; the light
! root rot; yellow leaves; small flies

plant a tree | planting a tree | a tree surgeon; a gardener
+ dig a hole [twice|three times] as wide as the roots
+ set the tree [upright|straight] with its collar at soil level
+ fill the hole with [the same|loose] soil and press it [gently|down]
+ tie the trunk [loosely|softly] to a stake
+ water it with [two buckets|a full can] every week
- dig a wide hole
- set it straight
- fill and press soil
- water it weekly
= autumn is a good time [to plant|for planting]
= mulch keeps the roots [moist|cool and moist]
? the buried pipes; the depth; the stake
! a cut cable; dry roots; a leaning trunk

start a compost heap | starting a compost heap | a gardener; a farmer
+ choose a [shady|flat] corner on bare soil
+ layer [kitchen scraps|grass cuttings] with [dry leaves|torn paper]
+ keep the heap as damp as a [wrung|squeezed] sponge
+ turn the heap with a fork every [two|three] weeks
+ leave out [meat and cheese|cooked food]
- layer scraps and leaves
- keep it damp
- turn it often
- leave out meat
= a good heap smells of [earth|woods after rain]
= small pieces rot [faster|sooner] than big ones
? the smell; the damp; the heat inside
! rats; a bad smell; a soggy heap

clean a kitchen | cleaning a kitchen | a cleaner; a housekeeper
+ clear the counters and [soak|stack] the dishes first
+ wipe the surfaces from [top to bottom|the back to the front]
+ scrub the stove with [soda|soap] and warm water
+ empty the fridge and wash [the shelves|each shelf]
+ mop the floor [last|on the way out]
- clear the counters
- scrub the stove
- wipe every surface
- mop the floor last
= grease gives way to [warm|hot] water and time
= ten minutes a day saves [a long Saturday|an hour later]
? the labels; the gas taps; the cloths
! mixed cleaners; a slippery floor; a scratched stove

wash wool | washing wool | a tailor; a knitter
+ fill a basin with [cool|lukewarm] water and [wool|mild] soap
+ press the [jumper|wool] under the water without rubbing
+ rinse it [twice|well] in water of the same heat
+ roll it in a [dry|clean] towel to press the water out
+ dry it flat, away from [the sun|heaters]
- use cool water
- press without rubbing
- roll it in towels
- dry it flat
= heat and rubbing make wool [shrink|felt]
= wool airs well and needs [few|fewer] washes
? the label; the water heat; the colours
! shrinking; running colours; stretched sleeves

remove a stain | removing a stain | a dry cleaner; a launderer
+ blot the stain with a [clean|dry] cloth at once
+ rinse the back of the cloth with [cold|cool] water
+ dab on [soap|vinegar|a paste of soda] and wait ten minutes
+ work from the edge [to the middle|inwards]
+ wash it as usual and dry it [in the air|in the shade]
- blot it at once
- rinse with cold water
- dab on soap
- work edge to middle
= hot water sets [blood and egg|many stains]
= fresh stains come out [more easily|sooner] than old ones
? a hidden corner; the label; the dye
! a bleached patch; a spreading mark; worn cloth

paint a room | painting a room | a painter; a decorator
+ wash the walls and fill the [holes|cracks]
+ tape the edges and cover [the floor|the furniture]
+ roll on a thin coat of [primer|undercoat]
+ paint the corners with a brush, then the walls with a [roller|wide roller]
+ wait [four hours|overnight] before the second coat
- wash the walls
- tape the edges
- roll on thin coats
- paint the corners first
= two thin coats look better than [one thick one|a thick one]
= colours look [darker|stronger] on a wall than on a card
? the ladder; the tape; the paint tin
! drips; a fall; heavy fumes

hang a shelf | hanging a shelf | a carpenter; a builder
+ mark the height with a [pencil|level and a pencil]
+ find the [studs|solid parts] in the wall
+ drill the holes as deep as the [plugs|screws]
+ screw the brackets [tight|firmly] to the wall
+ lay the board on and fix it [from below|with short screws]
- mark the height
- find the studs
- drill and plug holes
- screw brackets tight
= a long bracket carries [more|a heavier load]
= plaster alone holds [little|very little]
? the hidden wires; the level; the screws
! a drilled pipe; a crooked shelf; a falling board

fix a dripping tap | fixing a dripping tap | a plumber; a handyman
+ turn the water off [under the sink|at the main valve]
+ open the tap to let the [rest|last water] run out
+ unscrew the handle and lift out the [valve|cartridge]
+ swap the worn [washer|ring] for a new one of the same size
+ screw it all together and turn the water on [slowly|again]
- turn the water off
- unscrew the handle
- swap the washer
- turn water on slowly
= most drips come from a [worn|hard] washer
= a plug in the drain saves [lost|small] screws
? the main valve; the washer size; the seals
! a flood; a stripped screw; a cracked pipe

sharpen a knife | sharpening a knife | a butcher; a knife grinder
+ soak the stone in water for [ten|fifteen] minutes
+ hold the blade at [a low angle|about twenty degrees]
+ draw the blade along the stone in [long|even] strokes
+ turn the blade and count [the same|as many] strokes
+ finish on the fine side and wipe the blade [dry|clean]
- soak the stone
- hold a low angle
- draw long strokes
- wipe the blade
= a sharp knife slips less than a [blunt|dull] one
= paper shows whether an edge is [keen|even]
? the angle; the grip; the edge
! a cut finger; a chipped edge; a scratched blade

build a fire | building a fire | a ranger; a scout leader
+ clear a [circle|patch] of bare earth
+ lay dry [grass|bark] in the middle
+ stack thin twigs in a [cone|small tent] over it
+ light it from the side the wind [comes from|blows from]
+ add thicker wood [slowly|piece by piece]
- clear the ground
- stack dry twigs
- light the windward side
- add wood slowly
= a fire needs air as much as [wood|fuel]
= dry wood snaps [loudly|with a crack]
? the wind; the bucket of water; the local rules
! sparks; dry grass; smoke

store vegetables | storing vegetables | a grocer; a cook
+ keep potatoes in a [dark|cool], dry place
+ wrap leafy greens in a [damp|clean] cloth in the fridge
+ cut the tops off [carrots|beets] before you store them
+ leave tomatoes on the [counter|shelf], not in the fridge
+ keep onions [apart from|away from] potatoes
- keep potatoes dark
- wrap greens in cloth
- cut carrot tops off
- keep onions apart
= light turns potatoes [green|bitter]
= cold takes the taste out of tomatoes
? the crates; the damp; the fridge heat
! mould; sprouting; limp leaves
"""
